"""The choice of an attention kernel, without a GPU: its branches, and what CUDA would compile.

What NVIDIA's kernel computes on a card is not tested here.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from vit_jax.analysis.attention import with_attention_summary
from vit_jax.models import attention_kernels, devices, vit
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

SMALL = {
    "image_size": (12, 8),
    "channels": 3,
    "patch_size": 4,
    "depth": 2,
    "width": 32,
    "mlp_dim": 48,
    "num_heads": 4,
    "num_classes": 5,
    "dtype": "bfloat16",
}


class Card:
    """A device as JAX shows one."""

    platform, device_kind = "gpu", "a card"

    def __init__(self, capability="9.0"):
        self.compute_capability = capability


def pretend(monkeypatch, card):
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [card])


def build(**fields):
    model = vit.build(ViTConfig(**{**SMALL, **fields}))
    params = model.init(jax.random.key(0))
    # Heads and class tokens start at zero; with noise every path shows in the result.
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noisy = [leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return model, jax.tree.unflatten(tree, noisy)


def images(cfg):
    return jax.random.normal(jax.random.key(1), (2, *cfg.image_size, cfg.channels))


@pytest.mark.parametrize(
    ("card", "head_width", "dtype", "bias", "reason"),
    [
        (Card(), 64, "bfloat16", False, None),
        (Card("8.0"), 128, "bfloat16", False, None),
        (Card("7.5"), 64, "bfloat16", False, "older than Ampere"),
        (Card("gfx942"), 64, "bfloat16", False, "older than Ampere"),  # of AMD
        (Card(), 64, "float32", False, "model.dtype is 'float32'"),
        (Card(), 20, "bfloat16", False, "20 wide"),
        (Card(), 136, "bfloat16", False, "136 wide"),
        (Card(), 64, "bfloat16", True, "model.relative"),
    ],
)
def test_limits(monkeypatch, card, head_width, dtype, bias, reason):
    pretend(monkeypatch, card)
    found = attention_kernels.why_not_cudnn(head_width, dtype, bias)
    assert found is None if reason is None else reason in found


def test_asking_for_it_where_there_is_none_says_why():
    with pytest.raises(
        UserError, match="'cudnn', but this is no NVIDIA GPU but cpu: use 'auto'"
    ):
        build(attention="cudnn")


@pytest.mark.parametrize(("pool", "tokens"), [("cls", 7), ("gap", 6)])
def test_the_branch_computes_the_same_network(monkeypatch, pool, tokens):
    """XLA's own implementation stands in for NVIDIA's; 7 tokens are padded, 6 are not."""
    plain, params = build(attention="xla", pool=pool)
    fused = vit.build(dataclasses.replace(plain.config, attention="auto"))
    genuine, calls = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, implementation, **options):
        calls.append((implementation, q.shape, q.dtype, options["key_value_seq_lengths"]))
        return genuine(q, k, v, implementation="xla", **options)

    def loss(params, model, images):
        return (model.apply(params, images)[0] ** 2).sum()

    batch = images(plain.config)
    pretend(monkeypatch, Card())
    expected = jax.value_and_grad(loss)(params, plain, batch)
    summary, _ = with_attention_summary(plain, params)
    rollout = summary.apply(params, batch)[1]["attention_rollout"]
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    found = jax.value_and_grad(loss)(params, fused, batch)

    implementation, shape, dtype, lengths = calls[0]
    assert (implementation, dtype) == ("cudnn", jnp.bfloat16)
    assert shape == (2, tokens + tokens % 2, 4, 8)
    assert (lengths is None) == (tokens == 6)
    # Weights are rounded to bfloat16 after normalisation there, before it here.
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=0.02)
    gradients = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (jax.tree_util.keystr(path), a, b), found[1], expected[1]
    )
    for path, a, b in jax.tree.leaves(gradients, is_leaf=lambda x: isinstance(x, tuple)):
        if "['key']['bias']" not in path:  # which is zero but for rounding
            assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(b), path
    # Rollout asks for the weights, which come from plain products whatever the kernel is.
    summary, _ = with_attention_summary(fused, params)
    found = summary.apply(params, batch)[1]["attention_rollout"]
    np.testing.assert_allclose(found, rollout, rtol=0.02)


def test_what_cuda_would_compile_has_the_fused_kernel_in_both_directions(monkeypatch):
    """Lowered for a card that is not there; JAX would ask it for its version of cuDNN."""
    kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    model, params = build(num_heads=4)
    loss = lambda params, x: (model.apply(params, x)[0] ** 2).sum()
    pretend(monkeypatch, Card())
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda capability: False)
    traced = jax.jit(jax.grad(loss)).trace(params, images(model.config))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    called = re.findall(r"stablehlo\.custom_call @([\w$]+)", text)
    fused = [name for name in called if name.startswith("__cudnn$fmha")]
    assert len([name for name in fused if name.endswith("Backward")]) >= 1, set(called)
    assert len([name for name in fused if not name.endswith("Backward")]) >= 1, set(called)


def test_training_lowers_for_cuda_and_tpu_without_either():
    model, params = build(scan=True, remat="dots", attention="xla")
    loss = lambda params, x: (model.apply(params, x)[0] ** 2).sum()
    lowered = export.export(jax.jit(jax.grad(loss)), platforms=["cuda", "tpu"])(
        params, images(model.config)
    )
    assert lowered.platforms == ("cuda", "tpu")
