import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.data.mixing import Mixing, mix
from vit_jax.objectives.classification import smooth_labels, softmax_cross_entropy
from vit_jax.system.errors import UserError

DRAWS = 3000
DEIT = Mixing(mixup=0.8, cutmix=1.0, mix_form="timm")


def weight_of(key, alpha, b=4):
    """Mixes the identity, so that the weights can be read off."""
    images, targets = mix(key, jnp.eye(b).reshape(b, b, 1, 1), jnp.eye(b), Mixing(alpha))
    np.testing.assert_array_equal(images[:, :, 0, 0], targets)
    weight = float(targets[0, 0])
    expected = weight * np.eye(b) + (1 - weight) * np.roll(np.eye(b), 1, axis=0)
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    return weight


def sample(mixing, height=1, width=1):
    """What of its picture and target a black example keeps, mixed with a white one.

    (DRAWS, height, width), 0 where it is itself, and (DRAWS,). All tests draw as many, so
    that what is slow to compile is compiled once.
    """
    images = jnp.stack([jnp.zeros((height, width, 1)), jnp.ones((height, width, 1))])
    keys = jax.random.split(jax.random.key(1), DRAWS)
    draw = lambda key: mix(key, images, jnp.eye(2), mixing)
    pixels, targets = jax.vmap(draw)(keys)
    return np.asarray(pixels[:, 0, :, :, 0]), np.asarray(targets[:, 0, 0], np.float64)


# ---- mixup -------------------------------------------------------------------------------


def test_the_partner_is_the_one_before_and_targets_share_the_weight():
    assert 0.5 <= weight_of(jax.random.key(0), 0.5) <= 1


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.8])
def test_weights_are_beta_folded_at_a_half(alpha):
    _, weights = sample(Mixing(mixup=alpha))
    assert weights.min() >= 0.5
    draws = np.random.default_rng(0).beta(alpha, alpha, 400_000)
    folded = np.maximum(draws, 1 - draws)
    assert abs(weights.mean() - folded.mean()) < 4 * folded.std() / np.sqrt(DRAWS)
    assert abs((weights > 0.9).mean() - (folded > 0.9).mean()) < 0.035


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_timms_weights_are_beta_as_it_is(alpha):
    _, weights = sample(Mixing(mixup=alpha, mix_form="timm"))
    draws = np.random.default_rng(0).beta(alpha, alpha, 400_000)
    expected = np.quantile(draws, (np.arange(DRAWS) + 0.5) / DRAWS)
    assert np.abs(np.sort(weights) - expected).mean() < 0.02
    assert abs(weights.mean() - 0.5) < 0.025


def test_timms_partner_is_the_mirrored_batch():
    images, targets = jnp.eye(4).reshape(4, 4, 1, 1), jnp.eye(4)
    mixed, labels = mix(jax.random.key(0), images, targets, Mixing(mixup=0.8, mix_form="timm"))
    w = float(labels[0, 0])
    assert 0 < w < 1
    np.testing.assert_allclose(labels, w * np.eye(4) + (1 - w) * np.eye(4)[::-1], atol=1e-6)
    np.testing.assert_array_equal(mixed[:, :, 0, 0], labels)


@pytest.mark.parametrize("form", ["google", "timm"])
def test_no_alpha_means_no_mixing(form):
    images, targets = jnp.arange(24.0).reshape(2, 2, 2, 3), jnp.eye(2)
    for off in (Mixing(mix_form=form), Mixing(1.0, 1.0, mix_probability=0.0, mix_form=form)):
        mixed = mix(jax.random.key(0), images, targets, off)
        np.testing.assert_array_equal(mixed[0], images)
        np.testing.assert_array_equal(mixed[1], targets)
        assert not off.mixes


@pytest.mark.parametrize("mixing", [Mixing(0.2), Mixing(0.8, 1.0, 0.9, binary_targets=True)])
def test_mixing_can_be_jitted_and_keeps_shapes_and_dtypes(mixing):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, 6, 8, 3)), jnp.bfloat16)
    targets = jnp.eye(4, dtype=jnp.float32)
    traces = []

    @jax.jit
    def jitted(key):
        traces.append(key)
        return mix(key, images, targets, mixing)

    mixed = jitted(jax.random.key(0))
    assert (mixed[0].dtype, mixed[1].dtype) == (jnp.bfloat16, jnp.float32)
    assert (mixed[0].shape, mixed[1].shape) == ((4, 6, 8, 3), (4, 4))
    eager = mix(jax.random.key(0), images, targets, mixing)
    np.testing.assert_allclose(mixed[1], eager[1], atol=1e-6)
    np.testing.assert_allclose(
        mixed[0].astype(jnp.float32), eager[0].astype(jnp.float32), atol=0.05
    )
    for seed in range(1, 5):
        jitted(jax.random.key(seed))
    assert len(traces) == 1


@pytest.mark.parametrize("mixing", [Mixing(0.8), DEIT])
def test_targets_keep_their_mass(mixing):
    targets = jax.nn.one_hot(jnp.arange(8) % 3, 3)
    for seed in range(6):
        _, mixed = mix(jax.random.key(seed), jnp.zeros((8, 9, 9, 3)), targets, mixing)
        np.testing.assert_allclose(mixed.sum(1), 1, atol=1e-6)


def test_keys_decide_the_weight():
    weights = {weight_of(jax.random.key(seed), 0.5) for seed in range(8)}
    assert len(weights) == 8


# ---- CutMix ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["google", "timm"])
def test_cutmix_pastes_a_box_and_shares_targets_by_its_area(form):
    b, height, width = 4, 24, 40
    images = jnp.broadcast_to(jnp.arange(b)[:, None, None, None], (b, height, width, 3))
    mixing = Mixing(cutmix=1.0, mix_form=form)
    partner = np.roll(np.arange(b), 1) if form == "google" else np.arange(b)[::-1]
    seen = set()
    for seed in range(12):
        out, targets = mix(jax.random.key(seed), images.astype(float), jnp.eye(b), mixing)
        pasted = np.asarray(out[0, :, :, 0]) == partner[0]
        rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
        assert pasted.sum() == rows * columns  # one full rectangle
        expected = np.where(pasted[..., None], partner[:, None, None, None], np.asarray(images))
        np.testing.assert_array_equal(out, expected)
        share = 1 - rows * columns / (height * width)
        expected = share * np.eye(b) + (1 - share) * np.eye(b)[partner]
        np.testing.assert_allclose(targets, expected, atol=1e-6)
        seen.add((rows, columns))
    assert len(seen) > 8


def simulated_boxes(alpha, height, width, draws):
    """(top, bottom, left, right) of timm's boxes, written out in numpy."""
    rng = np.random.default_rng(0)
    ratio = np.sqrt(1 - rng.beta(alpha, alpha, draws))
    edges = []
    for length in (height, width):
        cut = (length * ratio).astype(int)
        centre = rng.integers(0, length, draws)
        edges += [np.clip(centre - cut // 2, 0, length)]
        edges += [np.clip(centre + (cut + 1) // 2, 0, length)]
    return np.stack(edges)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_boxes_are_those_of_timm(alpha):
    """Each edge has the distribution of the simulated one, and so has the area."""
    height, width = 20, 30
    pasted, shares = sample(Mixing(cutmix=alpha, mix_form="timm"), height, width)
    np.testing.assert_allclose(shares, 1 - pasted.mean((1, 2)), atol=1e-6)
    top, bottom, left, right = simulated_boxes(alpha, height, width, 100_000)
    area = (bottom - top) * (right - left) / (height * width)
    quantiles = np.linspace(0.05, 0.95, 19)
    difference = np.quantile(pasted.mean((1, 2)), quantiles) - np.quantile(area, quantiles)
    assert np.abs(difference).max() < 0.03
    full = area > 0
    for axis, low, high in [(2, top, bottom), (1, left, right)]:
        lines = pasted.any(axis=axis)[pasted.any((1, 2))]
        firsts, lasts = lines.argmax(1), lines.shape[1] - lines[:, ::-1].argmax(1)
        for found, expected in [(firsts, low[full]), (lasts, high[full])]:
            difference = np.quantile(found, quantiles) - np.quantile(expected, quantiles)
            assert np.abs(difference).max() <= 1
            assert abs(found.mean() - expected.mean()) < 0.4


# ---- which of the two, and whether -------------------------------------------------------


def methods(mixing):
    """Shares of batches left alone, cut, and blended, by what the pixels look like."""
    pixels, _ = sample(mixing, 9, 9)
    pixels = pixels.reshape(DRAWS, -1)
    alone = (pixels == 0).all(1)
    cut = np.isin(pixels, (0, 1)).all(1) & ~alone
    return alone.mean(), cut.mean(), 1 - alone.mean() - cut.mean()


@pytest.mark.parametrize(
    ("switch", "probability"), [(0.5, 1.0), (0.2, 1.0), (0.5, 0.4), (0.0, 1.0), (1.0, 1.0)]
)
def test_batches_are_cut_or_blended_by_chance(switch, probability):
    mixing = Mixing(5.0, 5.0, probability, switch, "timm")  # weights far from 0 and 1
    found = methods(mixing)
    expected = [1 - probability, probability * switch, probability * (1 - switch)]
    np.testing.assert_allclose(found, expected, atol=0.045)


def test_one_method_alone_needs_no_switch():
    assert methods(Mixing(mixup=5.0, mix_switch=1.0)) == (0, 0, 1)
    assert methods(Mixing(cutmix=5.0, mix_switch=0.0))[2] == 0


# ---- targets -----------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", [Mixing(0.5), DEIT])
def test_smoothing_after_mixing_is_mixing_what_was_smoothed(mixing):
    """By the formula of timm: K classes, 1 - s + s/K for the true one and s/K for others."""
    labels, k, s = np.asarray([0, 3, 1, 1]), 5, 0.1
    images = jnp.zeros((4, 8, 8, 3))
    for seed in range(5):
        key = jax.random.key(seed)
        _, targets = mix(key, images, jax.nn.one_hot(labels, k), mixing)
        smoothed = np.full((4, k), s / k)
        smoothed[np.arange(4), labels] = 1 - s + s / k
        _, expected = mix(key, images, jnp.asarray(smoothed, jnp.float32), mixing)
        np.testing.assert_allclose(smooth_labels(targets, s), expected, atol=1e-6)


def test_binary_targets_are_all_that_is_in_the_picture():
    labels = jnp.asarray([0, 1, 1, 3])
    binary = Mixing(mixup=0.8, mix_form="timm", binary_targets=True)
    _, targets = mix(
        jax.random.key(0), jnp.zeros((4, 2, 2, 3)), jax.nn.one_hot(labels, 5), binary
    )
    expected = [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 1, 0]]
    np.testing.assert_array_equal(targets, expected)
    alone = Mixing(binary_targets=True)
    _, targets = mix(jax.random.key(0), jnp.zeros((1, 2, 2, 3)), jnp.asarray([[0, 0.3]]), alone)
    np.testing.assert_array_equal(targets, [[0, 1]])


@pytest.mark.parametrize("mixing", [Mixing(0.5), Mixing(0.8, mix_form="timm"), DEIT])
def test_the_gradient_is_the_mixture_of_both_losses(mixing):
    """Of a linear softmax classifier, against the derivative written out in float64."""
    rng = np.random.default_rng(0)
    b, k = 6, 4
    images, labels = rng.normal(size=(b, 5, 5, 2)), rng.integers(0, k, b)
    weights = rng.normal(size=(50, k))
    key = jax.random.key(4)

    def loss(weights):
        targets = jax.nn.one_hot(labels, k)
        x, t = mix(key, jnp.asarray(images, jnp.float32), targets, mixing)
        return softmax_cross_entropy(x.reshape(b, -1) @ weights, t).mean()

    found = jax.grad(loss)(jnp.asarray(weights, jnp.float32))

    partner = np.roll(np.arange(b), 1) if mixing.mix_form == "google" else np.arange(b)[::-1]
    probe = jnp.zeros((b, 5, 5, 2)).at[1].set(1.0)  # what example 1 keeps, at every pixel
    kept = np.asarray(mix(key, probe, jnp.eye(b), mixing)[0][1], np.float64)
    share = kept.mean()
    assert 0.01 < share < 0.99
    x = (kept * images + (1 - kept) * images[partner]).reshape(b, -1)
    logits = x @ weights
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)

    def gradient(labels):
        return x.T @ (p - np.eye(k)[labels]) / b

    expected = share * gradient(labels) + (1 - share) * gradient(labels[partner])
    np.testing.assert_allclose(found, expected, atol=2e-6)


# ---- mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixup": -0.1}, r"data\.mixup is -0.1: use 0 for off, or a positive alpha"),
        ({"mixup": float("nan")}, r"data\.mixup is nan"),
        ({"cutmix": float("inf")}, r"data\.cutmix is inf"),
        ({"mix_probability": 1.5}, r"data\.mix_probability is 1.5: it is a share, use 0 to 1"),
        ({"mix_switch": -1}, r"data\.mix_switch is -1"),
        ({"mix_form": "deit"}, r"data\.mix_form is 'deit': use one of google, timm"),
    ],
)
def test_mistakes_are_explained(fields, message):
    with pytest.raises(UserError, match=message):
        Mixing(**fields)
