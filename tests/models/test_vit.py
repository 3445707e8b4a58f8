import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import vit
from vit_jax.models.model import count_parameters
from vit_jax.models.positions import posemb_sincos_2d
from vit_jax.models.variants import decode_variant
from vit_jax.system.errors import UserError

KEY = jax.random.key(0)
SMALL = vit.ViTConfig(
    image_size=(12, 8),
    channels=3,
    patch_size=4,
    depth=3,
    width=16,
    mlp_dim=32,
    num_heads=2,
    num_classes=5,
)


def make(name, image_size=(224, 224), num_classes=1000, **fields):
    shape, patch = decode_variant(name)
    return vit.build(
        vit.ViTConfig(
            image_size, 3, patch, **shape._asdict(), num_classes=num_classes, **fields
        )
    )


def count(model):
    return count_parameters(jax.eval_shape(model.init, KEY))


def small(**fields):
    """A small model with parameters that are all random, so that nothing is hidden by zeros."""
    model = vit.build(dataclasses.replace(SMALL, **fields))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        scale = 0.3 if path[-1].key == "kernel" else 0.1
        return jnp.float32((path[-1].key == "scale") + scale * rng.standard_normal(leaf.shape))

    return model, jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, KEY))


def images(batch=2, cfg=SMALL):
    return jax.random.normal(jax.random.key(2), (batch, *cfg.image_size, cfg.channels))


# --- Counts: the exact number of parameters of every published shape ------------------------

#           headless       1000 classes   21843 classes  21843 + pre_logits
COUNTS = {
    "Ti/16": (5_524_416, 5_717_416, 9_740_115, 9_777_171),
    "S/32": (22_493_952, 22_878_952, 30_903_507, 31_051_347),
    "S/16": (21_665_664, 22_050_664, 30_075_219, 30_223_059),
    "S/14": (21_619_584, 22_004_584, 30_029_139, 30_176_979),
    "S/8": (21_670_272, 22_055_272, 30_079_827, 30_227_667),
    "M/16": (38_324_736, 38_837_736, 49_530_195, 49_792_851),
    "B/32": (87_455_232, 88_224_232, 104_252_499, 104_843_091),
    "B/16": (85_798_656, 86_567_656, 102_595_923, 103_186_515),
    "B/14": (85_706_496, 86_475_496, 102_503_763, 103_094_355),
    "B/8": (85_807_872, 86_576_872, 102_605_139, 103_195_731),
    "L/32": (305_510_400, 306_535_400, 327_899_475, 328_949_075),
    "L/16": (303_301_632, 304_326_632, 325_690_707, 326_740_307),
    "L/14": (303_178_752, 304_203_752, 325_567_827, 326_617_427),
    "So400m/14": (412_444_656, 413_597_656, 437_629_635, 438_957_891),
    "H/14": (630_764_800, 632_045_800, 658_745_683, 660_385_363),
    "g/14": (1_011_202_432, 1_012_611_432, 1_041_979_219, 1_043_963_091),
    "g-opt/16": (1_134_749_184, 1_136_286_184, 1_168_321_875, 1_170_682_707),
    "G/14": (1_842_775_680, 1_844_440_680, 1_879_144_275, 1_881_914_835),
    "G-opt/16": (1_663_489_536, 1_665_026_536, 1_697_062_227, 1_699_423_059),
    "e/14": (3_805_421_312, 3_807_214_312, 3_844_585_811, 3_847_798_867),
}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name, scan):
    width = decode_variant(name)[0].width
    heads = [(0, None), (1000, None), (21_843, None), (21_843, width)]
    found = tuple(
        count(make(name, num_classes=classes, representation_size=size, scan=scan))
        for classes, size in heads
    )
    assert found == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("S/16", {"pool": "gap"}, 22_049_896),
        ("S/32", {"pool": "gap"}, 22_878_184),
        ("B/16", {"pool": "gap"}, 86_566_120),
        ("B/32", {"pool": "gap"}, 88_222_696),
        ("S/16", {"pool": "gap", "posemb": "sincos2d"}, 21_974_632),
        ("S/16", {"pool": "gap", "posemb": "sincos2d", "representation_size": 384}, 22_122_472),
        ("Ti/16", {"pool": "map", "num_classes": 0}, 5_968_704),
        ("S/16", {"pool": "map", "num_classes": 0}, 23_438_976),
        ("B/16", {"pool": "map", "num_classes": 0}, 92_884_224),
        ("L/16", {"pool": "map", "num_classes": 0}, 315_894_784),
        ("So400m/14", {"pool": "map", "num_classes": 0}, 427_680_704),
        ("g/14", {"pool": "map", "num_classes": 0}, 1_036_448_384),
        ("G/14", {"pool": "map", "num_classes": 0}, 1_881_132_416),
        ("B/16", {"image_size": (384, 384)}, 86_859_496),
    ],
)
def test_parameter_counts_of_other_heads_and_sizes(name, fields, expected):
    assert count(make(name, **fields)) == expected


def test_parameter_count_of_the_published_testing_model():
    cfg = vit.ViTConfig((224, 224), 3, 16, 1, 10, 10, 2, num_classes=1000)
    assert count(vit.build(cfg)) == 21_390


# --- Names: those of Google's checkpoints -------------------------------------------------


def names(params):
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in flat}


def test_names_and_shapes_are_those_of_published_checkpoints():
    model = make("B/16", num_classes=21_843, representation_size=768)
    found = names(jax.eval_shape(model.init, KEY))
    assert len(found) == 202
    block = "Transformer/encoderblock_11/"
    expected = {
        "cls": (1, 1, 768),
        "embedding/kernel": (16, 16, 3, 768),
        "embedding/bias": (768,),
        "Transformer/posembed_input/pos_embedding": (1, 197, 768),
        "Transformer/encoder_norm/scale": (768,),
        block + "LayerNorm_0/scale": (768,),
        block + "MultiHeadDotProductAttention_0/query/kernel": (768, 12, 64),
        block + "MultiHeadDotProductAttention_0/key/bias": (12, 64),
        block + "MultiHeadDotProductAttention_0/value/kernel": (768, 12, 64),
        block + "MultiHeadDotProductAttention_0/out/kernel": (12, 64, 768),
        block + "MultiHeadDotProductAttention_0/out/bias": (768,),
        block + "LayerNorm_1/bias": (768,),
        block + "MlpBlock_0/Dense_0/kernel": (768, 3072),
        block + "MlpBlock_0/Dense_1/kernel": (3072, 768),
        "pre_logits/kernel": (768, 768),
        "head/kernel": (768, 21_843),
        "head/bias": (21_843,),
    }
    assert {name: found.get(name) for name in expected} == expected


def test_stacking_layers_and_back_changes_nothing():
    _, params = small()
    stacked = vit.stack_layers(params)
    assert names(stacked)["Transformer/encoderblock/LayerNorm_0/scale"] == (3, 16)
    back = vit.unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


# --- Initialisation -----------------------------------------------------------------------


def test_initialisers():
    params = make("S/16", num_classes=10, head_bias_init=-6.9).init(KEY)
    block = params["Transformer"]["encoderblock_3"]
    attention, mlp = block["MultiHeadDotProductAttention_0"], block["MlpBlock_0"]
    assert not params["cls"].any()
    assert not params["head"]["kernel"].any()
    np.testing.assert_allclose(params["head"]["bias"], -6.9)
    assert params["Transformer"]["posembed_input"]["pos_embedding"].std() == pytest.approx(
        0.02, rel=0.02
    )
    # Xavier-uniform over the flattened matrix: bound sqrt(6 / (in + out)), std bound/sqrt(3).
    for kernel, ends in [
        (attention["query"]["kernel"], 384 + 384),
        (attention["out"]["kernel"], 384 + 384),
        (mlp["Dense_0"]["kernel"], 384 + 1536),
        (mlp["Dense_1"]["kernel"], 1536 + 384),
    ]:
        bound = np.sqrt(6 / ends)
        assert bound * 0.99 < abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not attention["query"]["bias"].any()
    assert mlp["Dense_0"]["bias"].std() == pytest.approx(1e-6, rel=0.2)
    # LeCun-normal: std 1/sqrt(P P C).
    assert params["embedding"]["kernel"].std() == pytest.approx(1 / np.sqrt(768), rel=0.02)
    assert not params["embedding"]["bias"].any()


def test_layers_start_differently_and_scan_starts_the_same():
    cfg = dataclasses.replace(SMALL, representation_size=7)
    unrolled = vit.build(cfg).init(KEY)
    scanned = vit.build(dataclasses.replace(cfg, scan=True)).init(KEY)
    jax.tree.map(np.testing.assert_array_equal, vit.stack_layers(unrolled), scanned)
    kernels = scanned["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert abs(kernels[0] - kernels[1]).max() > 0.1


# --- The function -------------------------------------------------------------------------


def reference_logits(params, image, heads, eps=1e-6):
    """Equations 1-4 in float64 NumPy, for one image, without sharing a line with the model."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, w):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + eps) * w["scale"] + w["bias"]

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    kernel = p["embedding"]["kernel"]
    size = kernel.shape[0]
    tokens = [p["cls"][0, 0]]
    for top in range(0, image.shape[0], size):
        for left in range(0, image.shape[1], size):
            patch = image[top : top + size, left : left + size]
            tokens.append(np.tensordot(patch, kernel, 3) + p["embedding"]["bias"])
    encoder = p["Transformer"]
    z = np.stack(tokens) + encoder["posembed_input"]["pos_embedding"][0]
    attentions = []
    for i in range(SMALL.depth):
        w = encoder[f"encoderblock_{i}"]
        y, a = norm(z, w["LayerNorm_0"]), w["MultiHeadDotProductAttention_0"]
        msa = a["out"]["bias"].copy()
        for h in range(heads):
            q, k, v = (
                y @ a[n]["kernel"][:, h] + a[n]["bias"][h] for n in ("query", "key", "value")
            )
            weights = softmax(q @ k.T / np.sqrt(q.shape[1]))
            attentions.append(weights)
            msa = msa + weights @ v @ a["out"]["kernel"][h]
        z = z + msa
        m = w["MlpBlock_0"]
        hidden = gelu(norm(z, w["LayerNorm_1"]) @ m["Dense_0"]["kernel"] + m["Dense_0"]["bias"])
        z = z + hidden @ m["Dense_1"]["kernel"] + m["Dense_1"]["bias"]
    y = norm(z, encoder["encoder_norm"])[0]
    return y @ p["head"]["kernel"] + p["head"]["bias"], np.stack(attentions)


def test_logits_and_attention_are_equations_1_to_4():
    model, params = small()
    x = images()
    logits, out = model.apply(params, x, return_attention=True)
    for i in range(2):
        expected, attentions = reference_logits(params, np.asarray(x[i], np.float64), heads=2)
        np.testing.assert_allclose(logits[i], expected, rtol=1e-5, atol=1e-5)
        found = np.concatenate([out[f"encoderblock_{n}/attention"][i] for n in range(3)])
        np.testing.assert_allclose(found, attentions, rtol=1e-5, atol=1e-6)


VARIATIONS = [
    {},
    {"pool": "gap", "posemb": "sincos2d"},
    {"pool": "map", "posemb": "learned_2d"},
    {"registers": 3, "layer_scale_init": 0.1, "gelu": "erf", "representation_size": 6},
]


@pytest.mark.parametrize("fields", VARIATIONS)
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scan_and_remat_change_neither_logits_nor_gradients(fields, remat):
    model, params = small(**fields)
    other = vit.build(dataclasses.replace(model.config, scan=True, remat=remat))
    x = images()

    def loss(model, params):
        logits, out = model.apply(params, x)
        return (logits**2).sum() + (out["encoderblock_1/msa"] ** 2).sum()

    value, grads = jax.jit(jax.value_and_grad(lambda p: loss(model, p)))(params)
    scanned = vit.stack_layers(params)
    value2, grads2 = jax.jit(jax.value_and_grad(lambda p: loss(other, p)))(scanned)
    np.testing.assert_allclose(value2, value, rtol=1e-6)
    largest = max(abs(leaf).max() for leaf in jax.tree.leaves(grads))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * largest)
    jax.tree.map(close, vit.unstack_layers(grads2), grads)


@pytest.mark.parametrize("fields", VARIATIONS)
def test_intermediates_have_the_documented_shapes(fields):
    model, params = small(**fields)
    cfg = model.config
    logits, out = model.apply(params, images(), return_attention=True)
    tokens = 6 + (cfg.pool == "cls") + cfg.registers
    assert logits.shape == out["logits"].shape == (2, 5)
    assert out["patch_embedding"].shape == (2, 6, 16)
    assert out["pooled"].shape == (2, 16)
    assert out["pre_logits"].shape == (2, cfg.representation_size or 16)
    for name in ("embedded", "encoded", "encoderblock_2/msa", "encoderblock_0/output"):
        assert out[name].shape == (2, tokens, 16)
    attention = out["encoderblock_1/attention"]
    assert attention.shape == (2, 2, tokens, tokens)
    np.testing.assert_allclose(attention.sum(-1), 1.0, rtol=1e-5)
    assert "encoderblock_1/attention" not in model.apply(params, images())[1]


def test_without_position_embeddings_the_order_of_patches_does_not_matter():
    for posemb, same in [("none", True), ("learned", False), ("learned_2d", False)]:
        model, params = small(posemb=posemb, pool="gap")
        x = images()
        swapped = jnp.concatenate([x[:, 4:8], x[:, :4], x[:, 8:]], axis=1)
        a, b = (model.apply(params, i)[0] for i in (x, swapped))
        assert np.allclose(a, b, atol=1e-5) == same, posemb


def test_learned_2d_adds_a_row_and_a_column_vector():
    model, params = small(posemb="learned_2d")
    table = params["Transformer"]["posembed_input"]
    _, out = model.apply(params, images())
    added = out["embedded"][0, 1:] - out["patch_embedding"][0]
    y, x = 2, 1  # the grid has 3 rows and 2 columns
    expected = np.concatenate([table["pos_embedding_x"][x], table["pos_embedding_y"][y]])
    np.testing.assert_allclose(added[y * 2 + x], expected, atol=1e-5)


def test_registers_have_no_position_and_stand_after_the_class_token():
    model, params = small(registers=2)
    _, out = model.apply(params, images())
    registers = params["Transformer"]["registers"][0]
    np.testing.assert_allclose(out["embedded"][1, 1:3], registers, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_any_channel_count_and_non_square_images(channels):
    model, params = small(channels=channels, image_size=(8, 20))
    x = images(cfg=model.config)
    assert model.config.grid == (2, 5)
    assert model.apply(params, x)[0].shape == (2, 5)


def test_head_is_zero_so_the_first_logits_are_the_bias():
    model = vit.build(dataclasses.replace(SMALL, head_bias_init=-10.0))
    logits, _ = model.apply(model.init(KEY), images())
    np.testing.assert_array_equal(logits, -10.0)


def test_no_classes_returns_the_representation():
    model, params = small(num_classes=0, representation_size=9)
    y, out = model.apply(params, images())
    assert y.shape == (2, 9)
    np.testing.assert_array_equal(y, out["pre_logits"])
    expected = np.tanh(
        np.asarray(out["pooled"]) @ params["pre_logits"]["kernel"]
        + params["pre_logits"]["bias"]
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5)


# --- Golden values of fixed position embeddings -------------------------------------------


def test_posemb_sincos_2d_golden_values():
    expected = [
        [0, 0, 1, 1, 0, 0, 1, 1],
        [0.841471, 0.0001, 0.540302, 1, 0, 0, 1, 1],
        [0, 0, 1, 1, 0.841471, 0.0001, 0.540302, 1],
        [0.841471, 0.0001, 0.540302, 1, 0.841471, 0.0001, 0.540302, 1],
    ]
    np.testing.assert_allclose(posemb_sincos_2d((2, 2), 8), expected, atol=1e-6)
    table = np.asarray(posemb_sincos_2d((14, 14), 384), np.float64)
    assert table.sum() == pytest.approx(34742.7630, abs=0.01)
    np.testing.assert_allclose(table[1, :4], [0.841471, 0.788029, 0.733691, 0.6799], atol=1e-5)


def test_posemb_sincos_2d_counts_columns_first_on_a_non_square_grid():
    table = posemb_sincos_2d((2, 3), 8)
    assert table.shape == (6, 8)
    np.testing.assert_allclose(table[2, 0], np.sin(2.0), rtol=1e-5)  # row 0, column 2
    np.testing.assert_allclose(table[3, 4], np.sin(1.0), rtol=1e-5)  # row 1, column 0


# --- Randomness ---------------------------------------------------------------------------


def test_dropout_needs_a_key_only_in_training_and_changes_with_it():
    model, params = small(dropout=0.5)
    run = lambda key: model.apply(params, images(), train=True, rngs={"dropout": key})[0]
    a, b, again = run(KEY), run(jax.random.key(9)), run(KEY)
    assert abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(a, again)
    plain = small()[0].apply(params, images())[0]
    np.testing.assert_array_equal(model.apply(params, images())[0], plain)


def test_dropout_follows_every_dense_layer_but_the_projections_to_q_k_and_v():
    model, params = small(dropout=0.5)
    _, out = model.apply(params, images(8), train=True, rngs={"dropout": KEY})
    zeros = {name: float((value == 0).mean()) for name, value in out.items()}
    for name in ("embedded", "encoderblock_0/msa", "encoderblock_2/mlp"):
        assert zeros[name] == pytest.approx(0.5, abs=0.05), name
    assert zeros["patch_embedding"] == 0


@pytest.mark.parametrize("scan", [False, True])
def test_stochastic_depth_drops_whole_branches_more_often_with_depth(scan):
    model, params = small(stochastic_depth=0.8, scan=scan)
    x = jnp.tile(images(1), (2000, 1, 1, 1))
    _, out = model.apply(params, x, train=True, rngs={"dropout": KEY})
    before = out["embedded"]
    for i, rate in enumerate([0.0, 0.4, 0.8]):
        after = out[f"encoderblock_{i}/output"]
        # An example is unchanged by a block when both of its branches are dropped.
        unchanged = np.asarray((after == before).all(axis=(1, 2))).mean()
        assert unchanged == pytest.approx(rate**2, abs=0.04)
        before = after


def test_stochastic_depth_keeps_the_expectation():
    cfg = dataclasses.replace(SMALL, stochastic_depth=0.5, depth=1)
    assert cfg.block_rates == [0.0]
    layer = vit.StochasticDepth()
    y = layer.apply({}, jnp.ones((20_000, 2)), 0.25, rngs={"dropout": KEY})
    assert y.mean() == pytest.approx(1.0, abs=0.02)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}


# --- Precision ----------------------------------------------------------------------------


def products(jaxpr):
    """Every matrix product in a program, nested ones included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("pool", ["cls", "map"])
def test_bfloat16_reaches_every_product_and_returns_float32(scan, pool):
    model, params = small(dtype="bfloat16", scan=scan, pool=pool, representation_size=8)
    loss = lambda params: (model.apply(params, images())[0] ** 2).sum()
    forward = list(products(jax.make_jaxpr(loss)(params).jaxpr))
    blocks = 1 if scan else 3
    assert len(forward) == 8 * blocks + 3 + 8 * (pool == "map")
    backward = list(products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert len(backward) > 2 * len(forward)
    for equation in forward:
        assert {v.aval.dtype.name for v in equation.invars} == {"bfloat16"}
        assert equation.outvars[0].aval.dtype == jnp.float32
    dense = [e for e in backward if len(e.invars[0].aval.shape) == 2]
    assert all({v.aval.dtype.name for v in e.invars} == {"bfloat16"} for e in dense)


def test_bfloat16_stays_near_float32():
    """At initialisation; a relative error of 2**-9 a product is what the format allows."""
    cfg = dataclasses.replace(SMALL, width=64, mlp_dim=256, num_classes=0)
    params = jax.jit(vit.build(cfg).init)(KEY)
    half = dataclasses.replace(cfg, dtype="bfloat16")
    full, fast = (vit.build(c).apply(params, images(8))[0] for c in (cfg, half))
    assert fast.dtype == jnp.float32
    assert 0 < (full - fast).std() < 0.01 * full.std()


# --- Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (10, 8)}, r"image_size is \(10, 8\).*multiples of 4"),
        ({"image_size": (0, 8)}, r"image_size"),
        ({"pool": "mean"}, r"model\.pool is 'mean': use one of cls, gap, cls_gap, map"),
        ({"posemb": "rope"}, r"model\.posemb is 'rope'"),
        ({"gelu": "fast"}, r"model\.gelu is 'fast': use one of tanh, erf"),
        ({"dtype": "float16"}, r"model\.dtype is 'float16'"),
        ({"remat": "some"}, r"model\.remat is 'some': use one of none, full, dots"),
        ({"num_heads": 3}, r"model\.width is 16, which 3 heads do not divide"),
        ({"width": 18, "posemb": "sincos2d"}, r"needs a multiple of 4"),
        ({"depth": 0}, r"model\.depth is 0"),
        ({"dropout": 1.0}, r"model\.dropout is 1\.0"),
        ({"stochastic_depth": -0.1}, r"model\.stochastic_depth is -0\.1"),
    ],
)
def test_what_cannot_be_built_is_one_sentence_with_the_field(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        dataclasses.replace(SMALL, **fields)
    assert not re.search(r"\n", str(caught.value))


def test_images_of_another_size_are_refused():
    model, params = small()
    with pytest.raises(ValueError, match=r"\(8, 8, 3\).*built for \(12, 8, 3\)"):
        model.apply(params, jnp.zeros((1, 8, 8, 3)))
