"""Rollout and distance against written-out loops and numbers worked out by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.tiny_models import model as tiny_model
from vit_jax.analysis import attention
from vit_jax.models import vit


def random_attention(seed, *shape):
    """(..., T, T) weights whose rows sum to 1."""
    scores = np.random.default_rng(seed).standard_normal(shape) * 2
    return jax.nn.softmax(jnp.asarray(scores, jnp.float32), axis=-1)


# --- Distance -----------------------------------------------------------------------------


def test_distances_between_patches_of_a_wide_grid():
    expected = np.array([[0, 8, 16], [8, 0, 8], [16, 8, 0]], np.float32)
    np.testing.assert_array_equal(attention.patch_distances((1, 3), 8), expected)
    far = attention.patch_distances((2, 3), 8)[0, 5]  # one down, two to the right
    assert far == pytest.approx(8 * 5**0.5)


def test_attention_to_oneself_has_no_distance():
    weights = jnp.broadcast_to(jnp.eye(6), (2, 3, 6, 6))
    distance = attention.mean_attention_distance(weights, (2, 3), 16)
    np.testing.assert_array_equal(distance, np.zeros((2, 3)))


@pytest.mark.parametrize("before", [0, 1, 5])
def test_uniform_attention_over_two_by_two_patches(before):
    tokens = 4 + before
    weights = jnp.full((1, 1, tokens, tokens), 1 / tokens)
    distance = attention.mean_attention_distance(weights, (2, 2), 16)
    # To itself, to two neighbours and across: (0 + 16 + 16 + 16 sqrt 2) / 4.
    np.testing.assert_allclose(distance, [[13.656854249]], rtol=1e-6)


def test_distance_as_a_loop_over_a_grid_that_is_not_square():
    grid, patch, before = (2, 3), 4, 2
    weights = random_attention(0, 2, 3, 8, 8)
    found = attention.mean_attention_distance(weights, grid, patch)
    for b, head in np.ndindex(2, 3):
        of_queries = []
        for q in range(6):
            row = np.asarray(weights[b, head, before + q, before:], np.float64)
            row /= row.sum()
            apart = [patch * np.hypot(q // 3 - k // 3, q % 3 - k % 3) for k in range(6)]
            of_queries.append(row @ apart)
        assert found[b, head] == pytest.approx(np.mean(of_queries), rel=1e-5)


def test_what_other_tokens_do_does_not_count():
    weights = np.array(random_attention(1, 1, 2, 7, 7))
    before = attention.mean_attention_distance(jnp.asarray(weights), (2, 3), 4)
    weights[:, :, 0] = np.eye(7)[3]  # the class token as a query
    weights[:, :, 1:] *= 0.5  # and as a key, of half of all attention
    weights[:, :, 1:, 0] += 0.5
    after = attention.mean_attention_distance(jnp.asarray(weights), (2, 3), 4)
    np.testing.assert_allclose(after, before, rtol=1e-6)


def test_queries_that_see_no_patch_are_left_out():
    weights = np.zeros((1, 2, 3, 3), np.float32)
    weights[..., 0] = 1.0  # all look at the class token
    weights[0, 0, 1] = [0.0, 0.25, 0.75]  # but one patch
    distance = attention.mean_attention_distance(jnp.asarray(weights), (1, 2), 4)
    assert distance[0, 0] == pytest.approx(3.0)
    assert np.isnan(distance[0, 1])


# --- Rollout ------------------------------------------------------------------------------


def rollout_by_hand(layers, readout, residual):
    """Full products in float64, of (k, T, T) weights; the row of the readout after each."""
    rows, product = [], np.eye(layers[0].shape[-1])
    for weights in layers:
        mixed = np.asarray(weights, np.float64).mean(axis=0)
        if residual:
            mixed = 0.5 * mixed + 0.5 * np.eye(len(mixed))
        product = (mixed / mixed.sum(axis=1, keepdims=True)) @ product
        rows.append(readout @ product)
    return np.array(rows)


@pytest.mark.parametrize("residual", [True, False])
def test_rollout_is_the_product_of_the_layers(residual):
    layers = [random_attention(seed, 2, 3, 5, 5) for seed in range(4)]
    readout = jnp.asarray([[1.0, 0, 0, 0, 0], [0, 0.25, 0.25, 0.25, 0.25]])
    found = attention.attention_rollout(layers, readout, residual)
    assert found.shape == (2, 4, 5)
    for b in range(2):
        expected = rollout_by_hand([a[b] for a in layers], np.asarray(readout[b]), residual)
        np.testing.assert_allclose(found[b], expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("residual", [True, False])
def test_rollout_of_attention_to_oneself_stays_at_the_class_token(residual):
    layers = [jnp.broadcast_to(jnp.eye(5), (1, 2, 5, 5))] * 3
    cls = jnp.eye(5)[:1]
    found = attention.attention_rollout(layers, cls, residual)
    np.testing.assert_array_equal(found, np.broadcast_to(cls, (1, 3, 5)))


def test_rollout_of_uniform_attention():
    layers = [jnp.full((1, 2, 4, 4), 0.25)] * 2
    cls = jnp.eye(4)[:1]
    plain = attention.attention_rollout(layers, cls, residual=False)
    np.testing.assert_allclose(plain, np.full((1, 2, 4), 0.25), rtol=1e-6)
    # (I / 2 + U / 2)^2 = I / 4 + 3 U / 4, since U U = U: 3/16 everywhere, 1/4 more at home.
    residual = attention.attention_rollout(layers, cls)
    np.testing.assert_allclose(residual[0, 1], [7 / 16, 3 / 16, 3 / 16, 3 / 16], rtol=1e-6)


# --- In a model ---------------------------------------------------------------------------

KINDS = {
    "cls and registers": {"registers": 2},
    "gap, class token, registers": {"pool": "gap", "class_token": True, "registers": 3},
    "cls_gap": {"pool": "cls_gap"},
    "map": {"pool": "map", "registers": 2},
    "two heads": {"distillation": "heads"},
}


def expected_readout(cfg, params, out, tokens):
    """(T,) float64 for the first image."""
    before, row = tokens - cfg.grid[0] * cfg.grid[1], np.zeros(tokens)
    if cfg.pool == "map":
        head = params["MAPHead_0"]
        inner = head["MultiHeadDotProductAttention_0"]
        z = np.asarray(out["encoded"][0, before:], np.float64)
        for k in range(cfg.num_heads):
            query = head["probe"][0, 0] @ inner["query"]["kernel"][:, k]
            keys = z @ inner["key"]["kernel"][:, k] + inner["key"]["bias"][k]
            scores = keys @ (query + inner["query"]["bias"][k]) / np.sqrt(keys.shape[1])
            weights = np.exp(scores - scores.max())
            row[before:] += weights / weights.sum() / cfg.num_heads
    elif cfg.distillation == "heads":
        row[:2] = 0.5
    else:
        share = {"cls": 1.0, "gap": 0.0, "cls_gap": 0.5}[cfg.pool]
        row[0] = share
        row[before:] = (1 - share) / (tokens - before)
        if cfg.pool == "cls":
            row[before:] = 0.0
    return row


@pytest.mark.parametrize("kind", KINDS)
def test_summaries_of_a_model(kind):
    cfg, params = tiny_model(image_size=(16, 24), **KINDS[kind])
    params = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    images = jax.random.normal(jax.random.key(0), (1, 16, 24, 3))
    model, same = attention.with_attention_summary(vit.build(cfg), params)
    _, out = jax.jit(model.apply)(same, images)
    layers = [out[f"encoderblock_{i}/attention"] for i in range(cfg.depth)]
    tokens = layers[0].shape[-1]
    before = attention.num_prefix_tokens(tokens, cfg.grid)
    assert before == cfg.prefix
    readout = expected_readout(cfg, params, out, tokens)
    expected = rollout_by_hand([a[0] for a in layers], readout, True)[:, before:]
    assert expected.std() > 1e-4  # there is something to see
    np.testing.assert_allclose(out["attention_rollout"][0], expected, atol=1e-5)
    assert out["attention_distance"].shape == (1, 2, 3)
    for i, weights in enumerate(layers):
        distance = attention.mean_attention_distance(weights, (2, 3), 8)
        np.testing.assert_allclose(out["attention_distance"][:, i], distance, rtol=1e-5)


def test_scanned_layers_give_the_same_and_predictions_stay():
    cfg, params = tiny_model(scan=True)
    params = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    scanned = vit.build(cfg)
    logits, out = jax.jit(partial(scanned.apply, return_attention=True))(params, images)
    model, own = attention.with_attention_summary(scanned, params, residual=False)
    assert not model.config.scan
    new_logits, new_out = jax.jit(model.apply)(own, images)
    np.testing.assert_allclose(new_logits, logits, atol=1e-5)
    product = np.eye(17)
    for i in range(2):
        product = np.asarray(out[f"encoderblock_{i}/attention"][1]).mean(axis=0) @ product
        found = new_out["attention_rollout"][1, i]
        np.testing.assert_allclose(found, product[0, 1:], atol=1e-6)
