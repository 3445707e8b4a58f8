import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.data.mixing import mixup


def weight_of(key, alpha, b=4):
    """Mixes the identity, so that the weights can be read off."""
    images, targets = mixup(key, jnp.eye(b).reshape(b, b, 1, 1), jnp.eye(b), alpha)
    np.testing.assert_array_equal(images[:, :, 0, 0], targets)
    weight = float(targets[0, 0])
    expected = weight * np.eye(b) + (1 - weight) * np.roll(np.eye(b), 1, axis=0)
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    return weight


def test_the_partner_is_the_one_before_and_targets_share_the_weight():
    assert 0.5 <= weight_of(jax.random.key(0), 0.5) <= 1


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.8, 1.0])
def test_weights_are_beta_folded_at_a_half(alpha):
    keys = jax.random.split(jax.random.key(1), 4000)
    one = jnp.eye(2)
    weights = np.asarray(
        jax.vmap(lambda key: mixup(key, one, one, alpha)[1][0, 0])(keys), np.float64
    )
    assert weights.min() >= 0.5
    draws = np.random.default_rng(0).beta(alpha, alpha, 400_000)
    folded = np.maximum(draws, 1 - draws)
    assert abs(weights.mean() - folded.mean()) < 4 * folded.std() / np.sqrt(4000)
    assert abs((weights > 0.9).mean() - (folded > 0.9).mean()) < 0.035


def test_no_alpha_means_no_mixing():
    images, targets = jnp.arange(24.0).reshape(2, 2, 2, 3), jnp.eye(2)
    mixed = mixup(jax.random.key(0), images, targets, 0.0)
    np.testing.assert_array_equal(mixed[0], images)
    np.testing.assert_array_equal(mixed[1], targets)


def test_mixup_can_be_jitted_and_keeps_dtypes():
    images, targets = jnp.ones((4, 2, 2, 3), jnp.bfloat16), jnp.eye(4, dtype=jnp.float32)
    mixed = jax.jit(mixup, static_argnums=3)(jax.random.key(0), images, targets, 0.2)
    assert (mixed[0].dtype, mixed[1].dtype) == (jnp.bfloat16, jnp.float32)
    eager = mixup(jax.random.key(0), images, targets, 0.2)
    np.testing.assert_allclose(mixed[1], eager[1], atol=1e-6)


def test_targets_keep_their_mass():
    targets = jax.nn.one_hot(jnp.arange(8) % 3, 3)
    _, mixed = mixup(jax.random.key(3), jnp.zeros((8, 1, 1, 3)), targets, 0.8)
    np.testing.assert_allclose(mixed.sum(1), 1, atol=1e-6)


def test_keys_decide_the_weight():
    weights = {weight_of(jax.random.key(seed), 0.5) for seed in range(8)}
    assert len(weights) == 8
