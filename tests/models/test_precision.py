"""Bfloat16 as GPUs and TPUs keep it, computed on a CPU that is taken for one of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import (
    attention,
    attention_kernels,
    attention_parts,
    devices,
    kernels,
    layers,
    mixer,
    vit,
)
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

SMALL = {
    "image_size": (16, 12),
    "channels": 3,
    "patch_size": 4,
    "depth": 2,
    "width": 64,
    "mlp_dim": 96,
    "num_heads": 4,
    "num_classes": 5,
}


@pytest.fixture(params=["gpu", "tpu"])
def accelerator(request, monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: request.param)
    return request.param


def noisy(params, scale=0.1):
    """Heads and class tokens start at zero; with noise every path shows in the result."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noise = [scale * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])


def build(**fields):
    model = vit.build(ViTConfig(**{**SMALL, **fields}))
    return model, noisy(model.init(jax.random.key(0)))


def images(cfg, count=4):
    return jax.random.normal(jax.random.key(1), (count, *cfg.image_size, cfg.channels))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def relative(found, expected):
    found, expected = np.float64(found), np.float64(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --- The table of kernels.py ---------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_stored_between_operations(monkeypatch, platform, dtype):
    monkeypatch.setattr(devices, "platform", lambda: platform)
    compact = platform != "cpu" and dtype == "bfloat16"
    model, params = build(dtype=dtype, registers=2, pool="cls_gap", representation_size=8)
    logits, out = jax.eval_shape(
        lambda p, x: model.apply(p, x, return_attention=True), params, images(model.config)
    )
    between = jnp.bfloat16 if compact else jnp.float32
    for name in ("patch_embedding", "embedded", "encoded"):
        assert out[name].dtype == between, name
    for name in ("msa", "mlp", "output"):
        assert out[f"encoderblock_1/{name}"].dtype == between, name
    assert out["encoderblock_1/attention"].dtype == jnp.float32
    assert {out[name].dtype for name in ("pooled", "pre_logits")} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    loss = lambda p, x: (model.apply(p, x)[0] ** 2).sum()
    grads = jax.eval_shape(jax.grad(loss), params, images(model.config))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


FORMS = {
    "plain": {},
    "scanned, dense results kept": {"scan": True, "remat": "dots"},
    "recomputed": {"remat": "full"},
    "MAP head": {"pool": "map"},
    "SwiGLU, LayerScale, registers": {"mlp": "swiglu", "layer_scale_init": 0.3, "registers": 2},
    "relative bias": {"relative": "bias", "posemb": "none"},
    "relative keys": {"relative": "keys"},
    "positions in each layer": {"posemb_at": "layers", "final_norm": "pooled", "pool": "gap"},
    "distilled": {"distillation": "heads"},
    "keys without bias": {"key_bias": False, "gelu": "erf"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_network_is_the_same_function(monkeypatch, form):
    """Against the same weights in float32: what is left is the rounding of bfloat16."""
    fields = FORMS[form]
    monkeypatch.setattr(devices, "platform", lambda: "tpu")
    half, params = build(dtype="bfloat16", **fields)
    exact, _ = build(dtype="float32", **fields)
    batch = images(exact.config)
    loss = lambda model: lambda p: (model.apply(p, batch)[0] ** 2).sum()
    found, grads = jax.jit(jax.value_and_grad(loss(half)))(params)
    expected, exact_grads = jax.jit(jax.value_and_grad(loss(exact)))(params)
    assert found == pytest.approx(float(expected), rel=0.03)
    pairs = jax.tree.map(lambda a, b: (a, b), grads, exact_grads)
    is_pair = lambda x: isinstance(x, tuple)
    for path, (a, b) in jax.tree_util.tree_leaves_with_path(pairs, is_leaf=is_pair):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" not in name:  # which is zero but for rounding
            assert relative(a, b) < 0.08, name  # of sums over few numbers


def test_a_mixer_too(monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: "tpu")
    cfg = {"tokens_mlp_dim": 24, **SMALL}
    del cfg["num_heads"]
    half, exact = (mixer.build(MixerConfig(**cfg, dtype=d)) for d in ("bfloat16", "float32"))
    params = noisy(exact.init(jax.random.key(0)))
    batch = images(exact.config)
    logits, out = half.apply(params, batch)
    assert out["encoded"].dtype == jnp.bfloat16
    assert relative(logits, exact.apply(params, batch)[0]) < 0.03


# --- Its parts, against float64 -------------------------------------------------------------


def test_layer_norm_loses_no_more_than_its_input_had_lost():
    """Where the mean is large against the deviation, too: the input's rounding dominates."""
    x = jnp.bfloat16(normal(0, 6, 64) + np.array([0, 1, 3, 10, 30, 100.0])[:, None])
    scale, bias, g = normal(1, 64), normal(2, 64), normal(3, 6, 64)

    def exact(x, scale, bias):
        c = x - x.mean(-1, keepdims=True)
        return c / jnp.sqrt((c * c).mean(-1, keepdims=True) + 1e-6) * scale + bias

    half = lambda x, scale, bias: layers.normalize(x, scale, bias, 1e-6)
    gradient = lambda f, g, *args: jax.grad(
        lambda *a: (f(*a).astype(g.dtype) * g).sum(), (0, 1, 2)
    )(*args)
    single = x, jnp.float32(scale), jnp.float32(bias)
    found, grads = half(*single), gradient(half, np.float32(g), *single)
    assert found.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        double = [jnp.asarray(np.asarray(a, np.float64)) for a in single]
        expected, exact_grads = exact(*double), gradient(exact, g, *double)
    np.testing.assert_allclose(np.float64(found), expected, rtol=2**-8, atol=2**-8)
    for a, b in zip(grads, exact_grads, strict=True):
        assert relative(a, b) < 0.01


def plain_attention(q, k, v, bias=None):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def compare(function, arrays, g, tolerance, dtype=jnp.float32):
    """Values and gradients of `function(*arrays)` against `plain_attention` in float64."""
    loss = lambda f: (
        lambda *a: (f(*a).astype(jnp.promote_types(a[0].dtype, "float32")) * g).sum()
    )
    places = tuple(range(len(arrays)))
    found = function(*(jnp.asarray(x, dtype) for x in arrays))
    grads = jax.grad(loss(function), places)(*(jnp.asarray(x, dtype) for x in arrays))
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(jnp.asarray(x, dtype), np.float64)) for x in arrays]
        expected = plain_attention(*wide)
        exact = jax.grad(loss(plain_attention), places)(*wide)
    assert relative(found, expected) < tolerance
    for i, (a, b) in enumerate(zip(grads, exact, strict=True)):
        assert relative(a, b) < tolerance, i


@pytest.mark.parametrize("heads_on_chip", [1, 2, 8, None])
def test_attention_in_parts_that_stay_on_the_chip(monkeypatch, heads_on_chip):
    monkeypatch.setattr(devices, "platform", lambda: "tpu")
    shape, tokens = (6, 10, 4, 8), 10
    if heads_on_chip is not None:
        monkeypatch.setattr(attention_parts, "ON_CHIP", heads_on_chip * 4 * tokens * 128)
    q, k, v, g = (normal(i, *shape) for i in range(4))
    compact = lambda q, k, v: attention.attend(q, k, v, "bfloat16")[0]
    assert compact(*map(jnp.bfloat16, (q, k, v))).dtype == jnp.bfloat16
    compare(compact, (q, k, v), g, 0.01, jnp.bfloat16)


def test_the_size_of_a_part_divides_the_batch_and_fits():
    each, heads = 1 << 18, 4
    most = attention_parts.ON_CHIP // (each * heads)
    assert attention_parts.part_size(4 * most, heads, each) == (most, heads)
    assert attention_parts.part_size(most - 1, heads, each) == (most - 1, heads)
    assert attention_parts.part_size(2 * 53, heads, each) == (
        2,
        heads,
    )  # 53 is prime and too many
    assert attention_parts.part_size(8, heads, attention_parts.ON_CHIP // 3) == (
        1,
        2,
    )  # heads of one
    assert attention_parts.part_size(8, heads, 2 * attention_parts.ON_CHIP) == (
        8,
        heads,
    )  # none fits


@pytest.mark.parametrize(("tokens", "width"), [(100, 64), (300, 72)])
def test_jaxs_kernel_for_long_sequences(tokens, width):
    q, k, v, g = (normal(i, 2, tokens, 3, width) for i in range(4))
    kernel = functools.partial(
        attention_kernels.splash_attention, dtype="float32", interpret=True
    )
    compare(kernel, (q, k, v), g, 1e-5, jnp.float32)


def test_which_form_a_tpu_takes_for_more_and_more_tokens(monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: "tpu")

    def form(tokens, kernel="auto", biased=False, dtype="bfloat16"):
        x = jax.ShapeDtypeStruct((8, tokens, 16, 64), jnp.bfloat16)
        return attention_kernels.choose(x, x, dtype, biased, kernel)

    assert [form(n) for n in (197, 1370, 4097)] == ["parts", "parts", "splash"]
    assert (form(4097, "xla"), form(4097, biased=True)) == ("parts", "whole")
    assert form(4097, dtype="float32") == "plain"
    assert form(197, "splash") == "splash"
    with pytest.raises(UserError, match="'splash', but model"):
        form(197, "splash", biased=True)
    with pytest.raises(UserError, match="but the scores of 4097 tokens do not fit"):
        form(4097, "pallas")


@pytest.mark.parametrize("examples", [1, 3])
def test_attention_with_a_bias_and_its_gradient(accelerator, examples):
    q, k, v, g = (normal(i, 3, 7, 2, 8) for i in range(4))
    bias = normal(5, examples, 2, 7, 7)
    function = lambda q, k, v, bias: attention.attend(q, k, v, "bfloat16", bias)[0]
    compare(function, (q, k, v, bias), g, 0.01, jnp.bfloat16)


def test_attention_survives_large_scores(accelerator):
    q, k, v = (jnp.bfloat16(100 * normal(i, 2, 5, 2, 4)) for i in range(3))
    y, weights = attention.attend(q, k, v, "bfloat16")
    assert np.isfinite(np.float32(y)).all()
    np.testing.assert_allclose(weights().sum(-1), 1.0, rtol=1e-5)


def test_gradients_of_weights_are_sums_in_float32():
    """4096 times 1 is a number that bfloat16 sums would miss."""
    x = jnp.ones((4096, 1, 4), jnp.bfloat16)
    kernel, bias = jnp.zeros((4, 2, 3)), jnp.zeros((2, 3))
    loss = lambda kernel, bias: kernels.affine(x, kernel, bias, jnp.bfloat16).sum(
        dtype="float32"
    )
    dw, db = jax.grad(loss, (0, 1))(kernel, bias)
    assert dw.dtype == db.dtype == jnp.float32
    np.testing.assert_array_equal(dw, 4096.0)
    np.testing.assert_array_equal(db, 4096.0)


def test_elementwise_functions_keep_only_their_arguments():
    x = jnp.bfloat16(normal(0, 5, 3))
    saved = jax.vjp(layers.GELU["tanh"], x)[1]
    kept = [leaf for leaf in jax.tree.leaves(saved) if getattr(leaf, "shape", None) == x.shape]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
