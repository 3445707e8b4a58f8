import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import resnet
from vit_jax.models.layers import Dense
from vit_jax.models.model import count_parameters
from vit_jax.models.variants import RESNETS, decode_resnet
from vit_jax.system.errors import UserError

KEY = jax.random.key(0)
SMALL = resnet.ResNetConfig((33, 20), 3, resnet=(2, 1), resnet_width=1, num_classes=5)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def shapes(module, *inputs):
    flat, _ = jax.tree_util.tree_flatten_with_path(
        jax.eval_shape(module.init, KEY, *inputs)["params"]
    )
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in flat}


def fill(tree):
    """Random values for every leaf, so that nothing is hidden by zeros and ones."""
    rng = np.random.default_rng(0)
    offset = lambda path: float(path[-1].key == "scale")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.float32(offset(path) + 0.3 * rng.standard_normal(leaf.shape)),
        tree,
    )


def small(**fields):
    model = resnet.build(dataclasses.replace(SMALL, **fields))
    model = model._replace(apply=jax.jit(model.apply, static_argnames="train"))
    return model, fill(jax.eval_shape(model.init, KEY))


# --- The same, written out in float64 -----------------------------------------------------


def window(x, size, stride, fill):
    """(B, H', W', size, size, C) windows of (B, H, W, C) under SAME padding."""
    pads = []
    for edge in x.shape[1:3]:
        total = max((-(-edge // stride) - 1) * stride + size - edge, 0)
        pads.append((total // 2, total - total // 2))
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
    x = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return x[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def std_conv(x, kernel, stride=1):
    kernel = np.asarray(kernel, np.float64)
    standardized = np.empty_like(kernel)
    for o in range(kernel.shape[-1]):
        w = kernel[..., o]
        deviation = np.sqrt(((w - w.mean()) ** 2).mean())
        standardized[..., o] = (w - w.mean()) / (deviation + 1e-5)
    windows = window(np.asarray(x, np.float64), kernel.shape[0], stride, 0.0)
    return np.einsum("byxhwi,hwio->byxo", windows, standardized)


def group_norm(x, params, groups=32):
    x = np.asarray(x, np.float64)
    b, h, w, c = x.shape
    x = x.reshape(b, h * w, groups, c // groups)
    mean, var = x.mean((1, 3), keepdims=True), x.var((1, 3), keepdims=True)
    x = ((x - mean) / np.sqrt(var + 1e-6)).reshape(b, h, w, c)
    return x * np.asarray(params["scale"]) + np.asarray(params["bias"])


def relu(x):
    return np.maximum(x, 0.0)


def unit(x, params, stride=1):
    norm = lambda y, name: group_norm(y, params[name])
    y = relu(norm(std_conv(x, params["conv1"]["kernel"]), "gn1"))
    y = relu(norm(std_conv(y, params["conv2"]["kernel"], stride), "gn2"))
    y = norm(std_conv(y, params["conv3"]["kernel"]), "gn3")
    if "conv_proj" in params:
        x = norm(std_conv(x, params["conv_proj"]["kernel"], stride), "gn_proj")
    return relu(x + y)


def root(x, params):
    x = relu(group_norm(std_conv(x, params["conv_root"]["kernel"], 2), params["gn_root"]))
    return window(x, 3, 2, -np.inf).max((3, 4))


# --- Names and table ----------------------------------------------------------------------


def test_names_of_resnets():
    assert decode_resnet("R50x1") == ((3, 4, 6, 3), 1)
    assert decode_resnet("R152x2") == ((3, 8, 36, 3), 2)
    assert decode_resnet("R200x13") == ((3, 24, 36, 3), 13)


@pytest.mark.parametrize("name", RESNETS)
def test_the_number_in_a_name_counts_the_layers(name):
    convolutions = 3 * sum(RESNETS[name])
    assert int(name[1:]) == convolutions + 2


@pytest.mark.parametrize("name", ["R50", "R50x", "R50x0", "R50x1x2", "x1", "R50x1.5", ""])
def test_a_name_that_does_not_read_says_how_to_write_it(name):
    with pytest.raises(UserError, match=r"model\.variant is .*'R50x1'"):
        decode_resnet(name)


def test_an_unknown_depth_suggests_the_nearest_and_lists_all():
    with pytest.raises(UserError, match=r"'R51x3'.*did you mean 'R50x3'.*R200"):
        decode_resnet("R51x3")


@pytest.mark.parametrize(
    ("block_sizes", "expected"),
    [((), 4), ((3,), 4), ((3, 4), 8), ((3, 4, 9), 16), ((3, 4, 6, 3), 32)],
)
def test_reduction(block_sizes, expected):
    assert resnet.reduction(block_sizes) == expected
    features = jax.eval_shape(features_of(block_sizes), KEY, jnp.zeros((1, 64, 96, 3)))
    assert features.shape[1:3] == (64 // expected, 96 // expected)


def features_of(block_sizes, width_factor=1):
    class Features(nn.Module):
        @nn.compact
        def __call__(self, images):
            return resnet.resnet_features(images, block_sizes, width_factor, "float32")

    return lambda key, images: Features().init_with_output(key, images)[0]


# --- Counts: the exact number of parameters -----------------------------------------------


@pytest.mark.parametrize(
    ("block_sizes", "expected"),
    [
        ((), 9_536),  # of R+Ti/16
        ((2, 2, 2, 2), 13_946_176),  # of R26+S/32
        ((3, 4, 9), 11_894_848),  # of R50+B/16
        ((3, 4, 6, 3), 23_508_032),  # of R50+L/32
    ],
)
def test_parameter_counts_of_the_stems_of_hybrids(block_sizes, expected):
    cfg = resnet.ResNetConfig((224, 224), 3, block_sizes, 1, num_classes=0)
    assert count_parameters(jax.eval_shape(resnet.build(cfg).init, KEY)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    # As many as ResNets with batch normalisation have: two arrays a normalisation as well.
    [("R50x1", 25_557_032), ("R101x1", 44_549_160), ("R152x1", 60_192_808)],
)
def test_parameter_counts_of_classifiers(name, expected):
    cfg = resnet.ResNetConfig((224, 224), 3, *decode_resnet(name), num_classes=1000)
    assert count_parameters(jax.eval_shape(resnet.build(cfg).init, KEY)) == expected


def test_a_hybrid_holds_the_stem_at_its_top_level_under_published_names():
    class Hybrid(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = resnet.resnet_features(images, (3, 4, 9), 1, "bfloat16", remat="full")
            return Dense((1024,), (768,), "float32", name="embedding")(x)

    found = shapes(Hybrid(), jnp.zeros((1, 224, 224, 3)))
    expected = {
        "conv_root/kernel": (7, 7, 3, 64),
        "gn_root/scale": (64,),
        "gn_root/bias": (64,),
        "block1/unit1/conv1/kernel": (1, 1, 64, 64),
        "block1/unit1/conv2/kernel": (3, 3, 64, 64),
        "block1/unit1/conv3/kernel": (1, 1, 64, 256),
        "block1/unit1/conv_proj/kernel": (1, 1, 64, 256),
        "block1/unit1/gn_proj/scale": (256,),
        "block2/unit1/conv_proj/kernel": (1, 1, 256, 512),
        "block2/unit4/gn2/bias": (128,),
        "block3/unit9/conv1/kernel": (1, 1, 1024, 256),
        "block3/unit9/conv2/kernel": (3, 3, 256, 256),
        "block3/unit9/conv3/kernel": (1, 1, 256, 1024),
        "block3/unit9/gn3/scale": (1024,),
        "embedding/kernel": (1024, 768),
    }
    assert expected.items() <= found.items()
    assert len(found) == 3 + 2 + 16 * 9 + 3 * 3
    assert {name.split("/")[1] for name in found if "proj" in name} == {"unit1"}


# --- Values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "stride", "hw"),
    [(1, 1, (3, 4)), (1, 2, (7, 10)), (3, 1, (5, 6)), (3, 2, (8, 9)), (7, 2, (9, 2))],
)
def test_std_conv(size, stride, hw):
    layer = resnet.StdConv(6, size, stride, "float32")
    x, kernel = normal(0, 2, *hw, 4), 0.5 + 0.01 * normal(1, size, size, 4, 6)
    found = jax.jit(layer.apply)({"params": {"kernel": kernel}}, x)
    expected = std_conv(x, kernel, stride)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_standardising_a_constant_kernel_is_not_a_division_by_zero():
    kernel = jnp.full((3, 3, 4, 6), 0.25)
    np.testing.assert_array_equal(resnet.standardize(kernel), 0.0)


def test_the_gradient_of_std_conv_goes_through_the_standardisation():
    layer = resnet.StdConv(6, 3, 2, "float32")
    x, kernel, step = normal(0, 2, 7, 8, 4), normal(1, 3, 3, 4, 6), normal(2, 3, 3, 4, 6)
    weights = normal(3, 2, 4, 4, 6)
    loss = lambda k: (layer.apply({"params": {"kernel": k}}, x) * weights).sum()
    found = (jax.grad(loss)(kernel) * step).sum()
    at = lambda h: (std_conv(x, kernel + h * np.float64(step), 2) * weights).sum()
    assert found == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-4)


def test_group_norm_keeps_its_digits_when_the_mean_is_large():
    norm = resnet.group_norm("norm")
    x = normal(0, 2, 5, 6, 64) + np.float32(1000.0)
    params = {"scale": 1 + 0.3 * normal(1, 64), "bias": normal(2, 64)}
    found = norm.apply({"params": params}, x)
    # The fast one-pass variance is wrong in the first digit here.
    np.testing.assert_allclose(found, group_norm(x, params), atol=1e-3)


@pytest.mark.parametrize("image_size", [(32, 32), (33, 20), (37, 30)])
def test_root_and_its_pooling_on_even_and_odd_sizes(image_size):
    model, params = small(image_size=image_size, resnet=())
    x = normal(0, 2, *image_size, 3)
    _, out = model.apply(params, x)
    np.testing.assert_allclose(out["root"], root(x, params), atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "stride"), [(128, 1), (64, 1), (128, 2)], ids=["same", "wider", "strided"]
)
def test_residual_unit(channels, stride):
    layer = resnet.ResidualUnit(32, stride, "float32")
    x = normal(0, 2, 7, 6, channels)
    params = fill(jax.eval_shape(layer.init, KEY, x)["params"])
    assert ("conv_proj" in params) == (channels != 128 or stride != 1)
    found = jax.jit(layer.apply)({"params": params}, x)
    np.testing.assert_allclose(found, unit(x, params, stride), atol=1e-4)


@pytest.mark.parametrize(("channels", "stride"), [(128, 1), (64, 2)])
def test_a_residual_unit_starts_as_its_shortcut(channels, stride):
    layer = resnet.ResidualUnit(32, stride, "float32")
    x = normal(0, 2, 6, 6, channels)
    # Whatever the kernels, the scale and bias that end the branch start at zero.
    end = jax.jit(lambda key: layer.init(key, x)["params"]["gn3"])(KEY)
    params = fill(jax.eval_shape(layer.init, KEY, x)["params"]) | {"gn3": end}
    y = jax.jit(layer.apply)({"params": params}, x)
    if "conv_proj" in params:
        x = group_norm(std_conv(x, params["conv_proj"]["kernel"], stride), params["gn_proj"])
    np.testing.assert_allclose(y, relu(x), atol=1e-5)


def test_logits_and_named_intermediates():
    model, params = small()
    x = normal(0, 2, 33, 20, 3)
    logits, out = model.apply(params, x, train=True, rngs={"dropout": KEY})
    assert out.keys() == {"root", "block1", "block2", "pooled", "pre_logits", "logits"}
    expected = unit(unit(root(x, params), params["block1"]["unit1"]), params["block1"]["unit2"])
    np.testing.assert_allclose(out["block1"], expected, rtol=1e-3, atol=1e-3)
    expected = unit(expected, params["block2"]["unit1"], 2)
    assert expected.shape == (2, 5, 3, 512)
    np.testing.assert_allclose(out["block2"], expected, rtol=1e-3, atol=1e-3)
    pooled = expected.mean((1, 2))
    np.testing.assert_allclose(out["pooled"], pooled, rtol=1e-3, atol=1e-3)
    expected = pooled @ np.asarray(params["head"]["kernel"]) + params["head"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-2)
    np.testing.assert_array_equal(out["logits"], logits)


def test_without_classes_the_model_returns_the_representation():
    model, params = small(num_classes=0)
    y, out = model.apply(params, normal(0, 2, 33, 20, 3))
    assert "head" not in params
    assert y.shape == (2, 512)
    np.testing.assert_array_equal(y, out["pooled"])


def test_the_head_starts_at_zero_with_its_bias():
    model = resnet.build(dataclasses.replace(SMALL, resnet=(), head_bias_init=-6.9))
    x = normal(0, 2, 33, 20, 3)
    logits, _ = jax.jit(lambda key: model.apply(model.init(key), x))(KEY)
    np.testing.assert_array_equal(logits, np.full((2, 5), np.float32(-6.9)))


def relative_distance(a, b):
    return np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b)


@functools.cache
def gradient_and_logits(**fields):
    model, params = small(resnet=(1,), **fields)
    x, weights = normal(0, 2, 33, 20, 3), normal(1, 2, 5)

    def loss(params):
        logits, _ = model.apply(params, x)
        return (logits * weights).sum(), logits

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def test_half_precision_is_close_in_value_and_gradient():
    gradient, logits = gradient_and_logits()
    half_gradient, half_logits = gradient_and_logits(dtype="bfloat16")
    assert half_logits.dtype == jnp.float32
    assert 0 < relative_distance(half_logits, logits) < 0.02
    for a, b in zip(*map(jax.tree.leaves, (half_gradient, gradient)), strict=True):
        assert a.dtype == jnp.float32
        # Loose, because activations near zero change sides and take their gradient along.
        assert relative_distance(a, b) < 0.2


def test_recomputation_changes_nothing():
    gradient, logits = gradient_and_logits()
    recomputed, again = gradient_and_logits(remat="full")
    assert relative_distance(again, logits) < 1e-6
    for a, b in zip(*map(jax.tree.leaves, (recomputed, gradient)), strict=True):
        assert relative_distance(a, b) < 1e-5


# --- Bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float16"}, r"model\.dtype is 'float16': use one of float32, bfloat16"),
        ({"remat": "dots"}, r"model\.remat is 'dots': use one of none, full"),
        ({"channels": 0}, r"model\.channels is 0"),
        ({"resnet_width": 0}, r"model\.resnet_width is 0"),
        ({"image_size": (0, 32)}, r"image_size is \(0, 32\)"),
        ({"resnet": (3, 0)}, r"model\.resnet is \(3, 0\)"),
    ],
)
def test_a_config_that_cannot_be_built_names_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **fields)


def test_images_of_another_size_are_refused():
    model, params = small()
    with pytest.raises(ValueError, match=r"\(32, 20, 3\).*\(33, 20, 3\)"):
        model.apply(params, normal(0, 2, 32, 20, 3))


def test_there_is_no_attention_to_return():
    with pytest.raises(UserError, match="no attention"):
        resnet.build(SMALL).apply({}, normal(0, 2, 33, 20, 3), return_attention=True)
