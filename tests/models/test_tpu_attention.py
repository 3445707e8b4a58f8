"""The fused kernel for TPUs, in Pallas's interpreter; compiled where there is libtpu."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import attention, attention_kernels, devices, tpu_attention
from vit_jax.system.errors import UserError


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def plain(q, k, v, bias=None):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@pytest.mark.parametrize(
    ("examples", "tokens", "heads", "width", "biases"),
    [
        (2, 17, 4, 64, None),
        (1, 50, 2, 72, 1),
        (2, 33, 3, 80, 2),
        (1, 1, 1, 88, 1),
        (2, 129, 1, 104, None),
    ],
)
def test_it_equals_float64(examples, tokens, heads, width, biases):
    shape = examples, tokens, heads, width
    q, k, v, g = (normal(i, *shape) for i in range(4))
    bias = None if biases is None else normal(4, biases, heads, tokens, tokens)
    single = [None if x is None else jnp.float32(x) for x in (q, k, v, g, bias)]
    *qkv, cotangent, single_bias = single
    (y,) = tpu_attention.forward(*qkv, single_bias, interpret=True)
    grads = tpu_attention.backward(*qkv, cotangent, single_bias, biases == 1, interpret=True)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x) for x in (q, k, v, bias) if x is not None]
        expected = plain(*wide)
        places = tuple(range(len(wide)))
        exact = jax.grad(lambda *a: (plain(*a) * g).sum(), places)(*wide)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    for a, b in zip(grads, exact, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, abs(np.asarray(b)).max()))


@pytest.mark.parametrize("biases", [None, 1, 8])
def test_model_attention_pallas_reaches_it_on_a_mesh(monkeypatch, biases):
    """Eight devices: heads and examples divided; the gradient of a shared bias is of all."""
    monkeypatch.setattr(devices, "platform", lambda: "tpu")
    calls = []
    for name in ("forward", "backward"):
        genuine = getattr(tpu_attention, name)

        def interpreted(*args, genuine=genuine, name=name, **options):
            calls.append(name)
            return genuine(*args, interpret=True, **options)

        monkeypatch.setattr(tpu_attention, name, interpreted)
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    q, k, v, g = (jnp.bfloat16(normal(i, 8, 6, 4, 8)) for i in range(4))
    bias = None if biases is None else jnp.float32(normal(5, biases, 4, 6, 6))
    arrays = [q, k, v] + ([] if bias is None else [bias])

    def loss(kernel, *arrays):
        bias = arrays[3] if len(arrays) > 3 else None
        y = attention.attend(*arrays[:3], "bfloat16", bias, kernel)[0]
        return (y.astype(jnp.float32) * g).sum()

    places = tuple(range(len(arrays)))
    expected = jax.grad(lambda *a: loss("xla", *a), places)(*arrays)

    def seen(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(lambda *a: loss("pallas", *a), places)(*args)

    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = jax.jit(seen)(*jax.device_put(arrays, where))
    assert set(calls) == {"forward", "backward"}
    for a, b in zip(found, expected, strict=True):
        a, b = np.float64(a), np.float64(b)
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("platform", "tokens", "keys", "dtype", "reason"),
    [
        ("cpu", 8, 8, "bfloat16", "this is no TPU but cpu"),
        ("tpu", 8, 8, "float32", "model.dtype is 'float32'"),
        ("tpu", 2048, 2048, "bfloat16", "the scores of 2048 tokens do not fit"),
        ("tpu", 1, 8, "bfloat16", "not the same tokens"),
    ],
)
def test_it_is_refused_with_the_reason(monkeypatch, platform, tokens, keys, dtype, reason):
    monkeypatch.setattr(devices, "platform", lambda: platform)
    q, k = (jnp.zeros((1, n, 1, 8)) for n in (tokens, keys))
    with pytest.raises(UserError, match=reason):
        attention.attend(q, k, k, dtype, kernel="pallas")


def test_auto_does_not_take_what_was_never_timed(monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: "tpu")
    q = jnp.zeros((1, 4, 1, 8), jnp.bfloat16)
    assert attention_kernels.choose(q, q, "bfloat16", False, "auto") == "parts"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'vit_jax[tpu]'",
)
@pytest.mark.parametrize("slice_", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_it_compiles_for_tpus(slice_):
    from vit_jax.planning.target import topology

    mesh = jax.sharding.Mesh(topology(slice_).devices[:1], "x")
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    cases = [(197, 16, 64), (257, 16, 80), (50, 12, 72), (577, 16, 88), (256, 8, 104)]
    for tokens, heads, width in cases:
        x = jax.ShapeDtypeStruct((2, tokens, heads, width), jnp.bfloat16, sharding=place)
        bias = jax.ShapeDtypeStruct((1, heads, tokens, tokens), jnp.float32, sharding=place)
        assert tpu_attention.why_not(tokens, width) is None
        for rest in ((), (bias,)):
            for function, inputs in ((tpu_attention.forward, 3), (tpu_attention.backward, 4)):
                text = jax.jit(function).lower(*[x] * inputs, *rest).compile().as_text()
                assert "tpu_custom_call" in text
