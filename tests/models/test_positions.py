"""Positions of every kind, against written-out sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import vit
from vit_jax.models.model import count_parameters
from vit_jax.models.positions import relative_index
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

KEY = jax.random.key(0)
BEIT = {
    "pool": "gap",
    "class_token": True,
    "final_norm": "pooled",
    "posemb": "none",
    "relative": "bias",
    "key_bias": False,
    "layer_scale_init": 0.1,
}


def config(**changes):
    tiny = {"depth": 2, "width": 16, "mlp_dim": 24, "num_heads": 2, "num_classes": 3}
    return ViTConfig((8, 12), 3, 4, **tiny | changes)


def randomized(cfg):
    """Parameters without zeros, so that nothing can hide."""
    params = vit.build(cfg).init(KEY)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    )


def apply(cfg, params, **options):
    images = jax.random.normal(jax.random.key(1), (2, *cfg.image_size, cfg.channels))
    return vit.build(cfg).apply(params, images, **options)


def test_beits_index_golden_values():
    expected = [
        [11, 9, 9, 9, 9],
        [10, 4, 3, 1, 0],
        [10, 5, 4, 2, 1],
        [10, 7, 6, 4, 3],
        [10, 8, 7, 5, 4],
    ]
    np.testing.assert_array_equal(relative_index((2, 2)), expected)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 4), (14, 14)])
def test_beits_index_names_each_offset_once(grid):
    rows, columns = grid
    index = relative_index(grid)
    offsets = {}
    for q in range(rows * columns):
        for k in range(rows * columns):
            offset = (q // columns - k // columns, q % columns - k % columns)
            assert offsets.setdefault(offset, index[1 + q, 1 + k]) == index[1 + q, 1 + k]
    assert sorted(offsets.values()) == list(range((2 * rows - 1) * (2 * columns - 1)))


def scores_by_hand(cfg, params, out, bias):
    """Attention weights of block 0 in float64, given what position adds to the scores."""
    block = jax.tree.map(np.float64, params["Transformer"]["encoderblock_0"])
    z = np.float64(out["embedded"])
    norm = block["LayerNorm_0"]
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    z = z * norm["scale"] + norm["bias"]
    attention = block["MultiHeadDotProductAttention_0"]
    project = lambda name: (
        np.einsum("btd,dhe->bhte", z, attention[name]["kernel"])
        + (attention[name]["bias"][:, None] if "bias" in attention[name] else 0)
    )
    q, k = project("query"), project("key")
    scores = np.einsum("bhqe,bhke->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias(q)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("key_bias", [True, False])
def test_relative_bias_is_added_to_the_scores(key_bias):
    cfg = config(relative="bias", key_bias=key_bias)
    params = randomized(cfg)
    _, out = apply(cfg, params, return_attention=True)
    attention = params["Transformer"]["encoderblock_0"]["MultiHeadDotProductAttention_0"]
    assert ("bias" in attention["key"]) == key_bias
    table = np.float64(attention["relative"]["table"])
    bias = lambda q: np.moveaxis(table[relative_index(cfg.grid)], -1, 0)
    expected = scores_by_hand(cfg, params, out, bias)
    np.testing.assert_allclose(out["encoderblock_0/attention"], expected, atol=1e-6)


def test_relative_keys_meet_the_query():
    cfg = config(relative="keys", pool="gap")
    params = randomized(cfg)
    _, out = apply(cfg, params, return_attention=True)
    attention = params["Transformer"]["encoderblock_0"]["MultiHeadDotProductAttention_0"]
    keys, tokens = np.float64(attention["relative"]["keys"]), 6

    def bias(q):
        added = np.zeros((2, 2, tokens, tokens))
        for i in range(tokens):
            for j in range(tokens):
                row = keys[i - j + tokens - 1]
                added[:, :, i, j] = (q[:, :, i] * row).sum(-1) / np.sqrt(8)
        return added

    expected = scores_by_hand(cfg, params, out, bias)
    np.testing.assert_allclose(out["encoderblock_0/attention"], expected, atol=1e-6)


@pytest.mark.parametrize("posemb", ["learned", "learned_2d", "sincos2d"])
def test_positions_at_every_layer(posemb):
    """With zero tables from the second layer on, `layers` is the stem; `shared` adds twice."""
    stem = config(posemb=posemb)
    own, shared = (config(posemb=posemb, posemb_at=at) for at in ("layers", "shared"))
    params = randomized(stem)
    encoder = dict(params["Transformer"])
    table = encoder.pop("posembed_input", None)
    expected, _ = apply(stem, params)
    if table:
        zeros = jax.tree.map(jnp.zeros_like, table)
        blocks = {
            f"encoderblock_{i}": encoder[f"encoderblock_{i}"] | {"posembed_input": tables}
            for i, tables in enumerate((table, zeros))
        }
        found, _ = apply(own, {**params, "Transformer": encoder | blocks})
        np.testing.assert_allclose(found, expected, atol=1e-6)
        blocks["encoderblock_1"]["posembed_input"] = table
        twice, _ = apply(own, {**params, "Transformer": encoder | blocks})
        found, _ = apply(shared, params)
        np.testing.assert_allclose(found, twice, atol=1e-6)
        assert abs(found - expected).max() > 1e-3
    scanned, _ = apply(dataclasses.replace(shared, scan=True), vit.stack_layers(params))
    np.testing.assert_allclose(scanned, apply(shared, params)[0], atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"relative": "bias", "posemb": "none"},
        {"relative": "keys", "posemb_at": "layers"},
        {"posemb_at": "shared", "remat": "full"},
        {"distillation": "heads"},
        {"mlp": "swiglu", "registers": 2, "pool": "cls_gap"},
        BEIT,
    ],
)
def test_scan_is_the_same_model(changes):
    cfg = config(**changes)
    params = randomized(cfg)
    expected, _ = apply(cfg, params)
    found, _ = apply(dataclasses.replace(cfg, scan=True), vit.stack_layers(params))
    np.testing.assert_allclose(found, expected, atol=1e-5)


BASE = {"depth": 12, "width": 768, "mlp_dim": 3072, "num_heads": 12, "num_classes": 1000}


@pytest.mark.parametrize(
    ("size", "patch", "changes", "count"),
    [
        (224, 16, BASE | BEIT, 86_530_984),
        (
            224,
            16,
            BASE | BEIT | {"depth": 24, "width": 1024, "mlp_dim": 4096, "num_heads": 16},
            304_430_568,
        ),
        (224, 16, BASE | {"distillation": "heads"}, 87_338_192),
        (224, 16, BASE | {"distillation": "token", "num_classes": 0}, 85_800_192),
        (518, 14, BASE | {"num_classes": 0, "layer_scale_init": 1e-5}, 86_580_480 - 768),
        (
            518,
            14,
            {
                "depth": 40,
                "width": 1536,
                "mlp_dim": 4096,
                "num_heads": 24,
                "num_classes": 0,
                "layer_scale_init": 1e-5,
                "mlp": "swiglu",
            },
            1_136_480_768 - 1536,
        ),
    ],
)
def test_published_counts(size, patch, changes, count):
    """BEiT-B and -L, distilled DeiT-B, DINOv2 B and giant (here without its mask token)."""
    cfg = ViTConfig((size, size), 3, patch, **changes)
    assert count_parameters(jax.eval_shape(vit.build(cfg).init, KEY)) == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_token": False}, r"model\.class_token is False.*model\.pool='gap'"),
        ({"distillation": "heads", "pool": "gap"}, r"needs model\.pool='cls', not 'gap'"),
        ({"distillation": "heads", "num_classes": 0}, "two linear heads"),
        ({"relative": "bias", "registers": 1}, r"relative='bias' has places"),
        ({"relative": "bias", "pool": "gap"}, r"relative='bias' has places"),
        ({"relative": "keys", "registers": 1}, "registers have no position"),
        ({"posemb_at": "layers", "registers": 1}, "registers have no position"),
        ({"posemb_at": "blocks"}, r"model\.posemb_at is 'blocks': use one of stem"),
    ],
)
def test_tokens_must_fit_what_is_done_with_them(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_distillation_averages_two_heads():
    cfg = config(distillation="heads")
    params = randomized(cfg)
    logits, out = apply(cfg, params)
    z = np.asarray(out["encoded"])
    by_hand = lambda name, token: token @ params[name]["kernel"] + params[name]["bias"]
    np.testing.assert_allclose(out["logits_cls"], by_hand("head", z[:, 0]), atol=1e-5)
    np.testing.assert_allclose(out["logits_dist"], by_hand("head_dist", z[:, 1]), atol=1e-5)
    np.testing.assert_allclose(logits, (out["logits_cls"] + out["logits_dist"]) / 2, atol=1e-6)
