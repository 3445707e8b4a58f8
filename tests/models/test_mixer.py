import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import mixer
from vit_jax.models.model import count_parameters
from vit_jax.models.variants import decode_mixer
from vit_jax.system.errors import UserError

KEY = jax.random.key(0)
SMALL = mixer.MixerConfig(
    image_size=(12, 8),
    channels=3,
    patch_size=4,
    depth=3,
    width=16,
    tokens_mlp_dim=10,
    mlp_dim=24,
    num_classes=5,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def images(batch=2):
    return normal(1, batch, 12, 8, 3)


def small(**fields):
    """A small model with parameters that are all random, so that nothing is hidden by zeros."""
    model = mixer.build(dataclasses.replace(SMALL, **fields))
    model = model._replace(apply=jax.jit(model.apply, static_argnames="train"))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        return jnp.float32((path[-1].key == "scale") + 0.3 * rng.standard_normal(leaf.shape))

    return model, jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, KEY))


# --- Table, counts and names --------------------------------------------------------------


@functools.cache
def shapes_of(name, num_classes):
    shape, patch = decode_mixer(f"Mixer-{name}")
    cfg = mixer.MixerConfig((224, 224), 3, patch, *shape, num_classes=num_classes)
    return jax.eval_shape(mixer.build(cfg).init, KEY)


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        ("B/16", 0, 59_111_472),
        ("B/16", 1000, 59_880_472),
        ("B/16", 21_843, 75_908_739),
        ("B/32", 1000, 60_293_428),
        ("L/16", 0, 207_171_168),
        ("L/16", 1000, 208_196_168),
    ],
)
def test_parameter_counts(name, num_classes, expected):
    assert count_parameters(shapes_of(name, num_classes)) == expected


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("S/32", 19),
        ("S/16", 18),
        ("B/32", 60),
        ("B/16", 59),
        ("L/32", 206),
        ("L/16", 207),
        ("H/14", 431),
    ],
)
def test_sizes_are_those_of_table_1(name, millions):
    assert round(count_parameters(shapes_of(name, 0)) / 1e6) == millions


def test_names_and_shapes_are_those_of_published_checkpoints():
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes_of("B/16", 1000))
    found = {"/".join(key.key for key in path): leaf.shape for path, leaf in flat}
    block = "MixerBlock_11"
    expected = {
        "stem/kernel": (16, 16, 3, 768),
        "stem/bias": (768,),
        f"{block}/LayerNorm_0/scale": (768,),
        f"{block}/LayerNorm_0/bias": (768,),
        f"{block}/token_mixing/Dense_0/kernel": (196, 384),
        f"{block}/token_mixing/Dense_0/bias": (384,),
        f"{block}/token_mixing/Dense_1/kernel": (384, 196),
        f"{block}/token_mixing/Dense_1/bias": (196,),
        f"{block}/LayerNorm_1/scale": (768,),
        f"{block}/LayerNorm_1/bias": (768,),
        f"{block}/channel_mixing/Dense_0/kernel": (768, 3072),
        f"{block}/channel_mixing/Dense_0/bias": (3072,),
        f"{block}/channel_mixing/Dense_1/kernel": (3072, 768),
        f"{block}/channel_mixing/Dense_1/bias": (768,),
        "pre_head_layer_norm/scale": (768,),
        "pre_head_layer_norm/bias": (768,),
        "head/kernel": (768, 1000),
        "head/bias": (1000,),
    }
    assert expected.items() <= found.items()
    assert len(found) == 6 + 12 * 12


@pytest.mark.parametrize("name", ["Mixer-B", "Mixer-B/", "Mixer-B/0", "Mixer-B/x", "Mixer-"])
def test_a_name_that_does_not_read_says_how_to_write_it(name):
    with pytest.raises(UserError, match=r"model\.variant is .*'Mixer-B/16'"):
        decode_mixer(name)


def test_an_unknown_size_lists_all():
    with pytest.raises(UserError, match=r"did you mean 'Mixer-B/16'.*Mixer-S, .*Mixer-H"):
        decode_mixer("Mixer-Bx/16")


# --- Values -------------------------------------------------------------------------------


def reference(params, x, gelu):
    """The logits and token maps of the paper's equations, written out in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(y, p):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return y * p["scale"] + p["bias"]

    def mlp(y, p):
        y = gelu(y @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
        return y @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]

    b = x.shape[0]
    tokens = [
        np.einsum("bijc,ijcd->bd", x[:, r : r + 4, c : c + 4], params["stem"]["kernel"])
        for r in (0, 4, 8)
        for c in (0, 4)
    ]
    z = np.stack(tokens, axis=1) + params["stem"]["bias"]
    maps = {"patch_embedding": z}
    for i in range(3):
        block = params[f"MixerBlock_{i}"]
        y = norm(z, block["LayerNorm_0"])
        y = np.stack([mlp(y[j].T, block["token_mixing"]).T for j in range(b)])
        maps[f"MixerBlock_{i}/token_mixing"] = y
        z = z + y
        maps[f"MixerBlock_{i}/channel_mixing"] = y = mlp(
            norm(z, block["LayerNorm_1"]), block["channel_mixing"]
        )
        maps[f"MixerBlock_{i}/output"] = z = z + y
    maps["encoded"] = z = norm(z, params["pre_head_layer_norm"])
    maps["pooled"] = maps["pre_logits"] = z = z.mean(1)
    maps["logits"] = z @ params["head"]["kernel"] + params["head"]["bias"]
    return maps


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def erf_gelu(x):
    with jax.enable_x64(True):
        return 0.5 * x * (1 + np.asarray(jax.scipy.special.erf(jnp.asarray(x / 2**0.5))))


@pytest.mark.parametrize(("name", "gelu"), [("tanh", tanh_gelu), ("erf", erf_gelu)])
def test_logits_and_every_intermediate(name, gelu):
    model, params = small(gelu=name)
    logits, out = model.apply(params, images())
    expected = reference(params, np.float64(images()), gelu)
    assert out.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(out[key], value, atol=2e-5 * np.abs(value).max())
    np.testing.assert_array_equal(logits, out["logits"])


def test_without_classes_the_model_returns_the_representation():
    model, params = small(num_classes=0)
    y, out = model.apply(params, images())
    assert "head" not in params
    assert y.shape == (2, 16)
    np.testing.assert_array_equal(y, out["pooled"])


def test_the_head_starts_at_zero_with_its_bias():
    model = mixer.build(dataclasses.replace(SMALL, depth=1, head_bias_init=-6.9))
    logits, out = jax.jit(lambda key: model.apply(model.init(key), images()))(KEY)
    np.testing.assert_array_equal(logits, np.full((2, 5), np.float32(-6.9)))
    assert jnp.abs(out["pooled"]).max() > 0.1


def relative_distance(a, b):
    return np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b)


def compare_gradients(found, expected, tolerance):
    # The last bias of token mixing moves all channels of a token alike, which every later
    # LayerNorm takes out again: its gradient is zero but for rounding.
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == jnp.float32
        difference = np.linalg.norm(np.subtract(a, b))
        allowed = tolerance * max(np.linalg.norm(b), 1e-3 * largest)
        assert difference < max(allowed, np.finfo(np.float32).eps * largest)


WEIGHTS = normal(2, 4, 5)


@functools.cache
def gradient_and_logits(train=False, **fields):
    model, params = small(**fields)

    def loss(params):
        logits, _ = model.apply(params, images(4), train=train, rngs={"dropout": KEY})
        return (logits * WEIGHTS).sum(), logits

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def test_the_gradient_is_that_of_the_reference():
    _, params = small()
    gradient, _ = gradient_and_logits()
    step = jax.tree.map(lambda p: normal(3, *p.shape).astype(np.float64), params)
    along = jax.tree.map(lambda g, s: (np.float64(g) * s).sum(), gradient, step)

    def at(h):
        moved = jax.tree.map(lambda p, s: np.float64(p) + h * s, params, step)
        logits = reference(moved, np.float64(images(4)), tanh_gelu)["logits"]
        return (logits * WEIGHTS).sum()

    expected = (at(1e-5) - at(-1e-5)) / 2e-5
    assert sum(jax.tree.leaves(along)) == pytest.approx(expected, rel=1e-4)


def test_half_precision_is_close_in_value_and_gradient():
    gradient, logits = gradient_and_logits()
    half_gradient, half_logits = gradient_and_logits(dtype="bfloat16")
    assert 0 < relative_distance(half_logits, logits) < 0.02
    compare_gradients(half_gradient, gradient, 0.04)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_changes_nothing_and_draws_the_same_masks(remat):
    random = {"train": True, "depth": 2, "stochastic_depth": 0.5}
    gradient, logits = gradient_and_logits(**random)
    recomputed, again = gradient_and_logits(remat=remat, **random)
    assert relative_distance(again, logits) < 1e-6
    compare_gradients(recomputed, gradient, 1e-5)
    assert relative_distance(logits, gradient_and_logits()[1]) > 0.1


# --- Training -----------------------------------------------------------------------------


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    assert dataclasses.replace(SMALL, stochastic_depth=0.4).block_rates == [0.0, 0.2, 0.4]
    model, params = small(stochastic_depth=0.5, depth=2)
    _, out = model.apply(params, images(512), train=True, rngs={"dropout": KEY})
    before, after = out["MixerBlock_0/output"], out["MixerBlock_1/output"]
    token, channel = out["MixerBlock_1/token_mixing"], out["MixerBlock_1/channel_mixing"]
    kept = {}
    for t in (0.0, 2.0):
        for c in (0.0, 2.0):
            difference = after - (before + t * token + c * channel)
            kept[t, c] = float((jnp.abs(difference).max((1, 2)) < 1e-4).mean())
    assert sum(kept.values()) == 1.0
    assert all(share == pytest.approx(0.25, abs=0.07) for share in kept.values())
    token = out["MixerBlock_0/token_mixing"] + out["MixerBlock_0/channel_mixing"]
    np.testing.assert_allclose(before, out["patch_embedding"] + token, atol=1e-5)


def test_dropout_is_for_training_only():
    model, params = small(depth=1, dropout=0.5)
    plain, _ = small(depth=1)[0].apply(params, images())
    evaluated, _ = model.apply(params, images())
    np.testing.assert_array_equal(evaluated, plain)
    once, again, other = (
        model.apply(params, images(), train=True, rngs={"dropout": jax.random.key(seed)})[0]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(once, again)
    assert jnp.abs(once - other).max() > 1e-3
    assert jnp.abs(once - plain).max() > 1e-3


# --- Bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float16"}, r"model\.dtype is 'float16': use one of float32, bfloat16"),
        ({"remat": "all"}, r"model\.remat is 'all': use one of none, full, dots"),
        ({"gelu": "quick"}, r"model\.gelu is 'quick': use one of tanh, erf"),
        ({"tokens_mlp_dim": 0}, r"model\.tokens_mlp_dim is 0"),
        ({"mlp_dim": -1}, r"model\.mlp_dim is -1"),
        ({"depth": 0}, r"model\.depth is 0"),
        ({"patch_size": 0}, r"model\.patch_size is 0"),
        ({"dropout": 1.0}, r"model\.dropout is 1\.0"),
        ({"stochastic_depth": -0.1}, r"model\.stochastic_depth is -0\.1"),
        ({"image_size": (12, 9)}, r"image_size is \(12, 9\).*multiples of 4"),
        ({"image_size": (0, 8)}, r"image_size is \(0, 8\)"),
    ],
)
def test_a_config_that_cannot_be_built_names_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **fields)


def test_images_of_another_size_are_refused():
    model, params = small()
    with pytest.raises(ValueError, match=r"\(8, 12, 3\).*\(12, 8, 3\)"):
        model.apply(params, normal(0, 2, 8, 12, 3))


def test_there_is_no_attention_to_return():
    with pytest.raises(UserError, match="no attention"):
        mixer.build(SMALL).apply({}, images(), return_attention=True)
