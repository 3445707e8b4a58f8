import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import attention, kernels, layers


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_gradients_of_matmul_are_those_of_the_plain_product(dtype, tolerance):
    x, w, g = normal(0, 6, 5), normal(1, 5, 4), normal(2, 6, 4)
    loss = lambda product: lambda x, w: (product(x, w) * g).sum()
    found = jax.grad(loss(lambda x, w: kernels.matmul(x, w, dtype)), (0, 1))(x, w)
    expected = jax.grad(loss(jnp.matmul), (0, 1))(x, w)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * 5)


def test_layer_norm_keeps_its_digits_when_the_mean_is_large():
    x = np.asarray(normal(0, 4, 64), np.float64) + 1000.0
    norm = layers.layer_norm(1e-6, "float32", "norm")
    found = norm.apply(norm.init(jax.random.key(0), jnp.zeros((4, 64))), jnp.float32(x))
    x = np.asarray(np.float32(x), np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    # The fast one-pass variance is wrong in the first digit here.
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_gelu_forms():
    x = jnp.linspace(-6, 6, 1001)
    exact = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in np.float64(x)])
    np.testing.assert_allclose(layers.GELU["erf"](x), exact, atol=1e-6)
    difference = abs(layers.GELU["tanh"](x) - exact)
    assert difference.max() == pytest.approx(4.73e-4, rel=0.01)


def test_attention_of_one_query_is_a_weighted_mean_and_survives_large_scores():
    q, k, v = 100 * normal(0, 1, 3, 2, 4), 100 * normal(1, 1, 5, 2, 4), normal(2, 1, 5, 2, 4)
    y, weights = attention.attend(q, k, v, "float32")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
    np.testing.assert_allclose(weights(), jax.nn.softmax(scores), atol=1e-5)
    expected = jnp.einsum("bhqk,bkhd->bqhd", weights(), v)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 4), (1, 17, 1, 8), (2, 9, 2, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_gradients_of_attention_are_those_of_the_plain_formula(shape, dtype, tolerance):
    def plain(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(shape[-1]))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    inputs, g = [normal(i, *shape) for i in range(3)], normal(3, *shape)
    grad = lambda f: jax.jit(jax.grad(lambda *args: (f(*args) * g).sum(), (0, 1, 2)))(*inputs)
    found = grad(lambda q, k, v: attention.attend(q, k, v, dtype)[0])
    for a, b in zip(found, grad(plain), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, abs(b).max()))


def test_large_products_run_in_bfloat16_on_a_cpu_forward_and_backward():
    """XLA may take operands back to float32, at half the speed, without a word."""
    width, hidden = 64, 256
    weights = normal(0, width, 4, 16), normal(1, width, hidden), normal(2, hidden, width)

    def loss(weights, x):
        to_heads, widen, narrow = weights
        q = kernels.matmul(x.reshape(-1, width), to_heads.reshape(width, width), "bfloat16")
        q = q.reshape(2, 40, 4, 16)
        y = attention.attend(q, q + 1, q + 2, "bfloat16")[0].reshape(-1, width)
        h = layers.erf_gelu(kernels.matmul(y, widen, "bfloat16"))
        return (kernels.matmul(h, narrow, "bfloat16") ** 2).sum()

    def operands(function, *args):
        program = jax.jit(function).lower(*args).compile().as_text()
        names = re.findall(r" dot\(%?([^ ,]+), %?([^ ,)]+)\)", program)
        kind = lambda name: re.search(rf"{re.escape(name)} = (\w+)\[", program)[1]
        return sorted("/".join(map(kind, pair)) for pair in names)

    square = normal(4, width, width)
    if operands(lambda x: kernels.matmul(x, x, "bfloat16"), square) != ["bf16/bf16"]:
        pytest.skip("XLA has no product in bfloat16 on this processor")
    found = operands(jax.grad(loss), weights, normal(3, 2, 40, width))
    # All but one: the gradient of the kernel that narrows, whose operand is not transposed.
    assert found == ["bf16/bf16"] * 13 + ["f32/f32"]


def test_dense_contracts_all_trailing_axes():
    layer = layers.Dense((2, 3), (4, 5), "float32")
    x = normal(0, 7, 8, 2, 3)
    params = layer.init(jax.random.key(0), x)
    y = layer.apply(params, x)
    kernel = params["params"]["kernel"]
    assert kernel.shape == (2, 3, 4, 5)
    np.testing.assert_allclose(y, jnp.einsum("nmab,abcd->nmcd", x, kernel), atol=1e-5)
