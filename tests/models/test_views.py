"""A network for images of another size, and for some of the patches only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import mixer, registry, vit
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.resize_positions import METHODS, resize_params
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

CFG = ViTConfig(
    image_size=(12, 8), channels=1, patch_size=4, depth=2, width=16, mlp_dim=32, num_heads=2,
    num_classes=3,
)  # fmt: skip
KEY = jax.random.key(0)


def random_params(model):
    shapes = jax.eval_shape(model.init, KEY)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(
        tree, [0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def images(size, count=2):
    return jax.random.normal(KEY, (count, *size, 1))


@pytest.mark.parametrize(
    ("changes", "scan"),
    [
        ({}, True),
        ({"posemb": "learned_2d", "pool": "gap"}, False),
        ({"posemb": "sincos2d"}, True),
        ({"posemb_at": "layers"}, False),
        ({"posemb_at": "layers"}, True),
        ({"posemb_at": "shared"}, True),
        ({"posemb": "none", "relative": "bias"}, False),
        ({"posemb": "none", "relative": "bias"}, True),
        ({"registers": 2}, True),
    ],
    ids=str,
)
def test_another_size_is_the_network_with_resized_positions(changes, scan):
    """As the converter resizes them: in float64, layer by layer, outside the program."""
    cfg = dataclasses.replace(CFG, scan=scan, **changes)
    new = dataclasses.replace(cfg, image_size=(8, 20))
    model, method = registry.build(cfg), "geometric" if cfg.relative == "bias" else "bicubic"
    params = random_params(model)
    x = images((8, 20))
    found = jax.jit(model.at((8, 20), method).apply)(params, x)[0]
    apart = vit.unstack_layers(params) if scan else params
    apart = resize_params(jax.tree.map(np.asarray, apart), cfg, new, method)
    expected = vit.build(dataclasses.replace(new, scan=False)).apply(apart, x)[0]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert jax.tree.map(np.shape, model.at((8, 20)).init(KEY)) == jax.tree.map(np.shape, params)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_size_changes_nothing(method):
    model = registry.build(CFG)
    params, x = random_params(model), images((12, 8))
    np.testing.assert_array_equal(
        model.at((12, 8), method).apply(params, x)[0], model.apply(params, x)[0]
    )


def test_gradients_pass_through_the_resize():
    model = registry.build(CFG)
    params, x = random_params(model), images((8, 8))
    small = model.at((8, 8), "half_pixel")
    loss = lambda params: small.apply(params, x)[0].sum()
    table = lambda tree: tree["Transformer"]["posembed_input"]["pos_embedding"]
    gradient = jax.grad(loss)(params)
    direction = jax.random.normal(jax.random.key(1), table(params).shape)

    def along(t):
        moved = jax.tree.map(lambda x: x, params)
        moved["Transformer"]["posembed_input"]["pos_embedding"] = table(params) + t * direction
        return float(loss(moved))

    slope = (along(1e-2) - along(-1e-2)) / 2e-2
    assert float((table(gradient) * direction).sum()) == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("changes", [{}, {"registers": 2}, {"pool": "gap"}], ids=str)
def test_patches_that_are_kept_are_all_that_the_encoder_sees(changes):
    model = registry.build(dataclasses.replace(CFG, **changes))
    params, x = random_params(model), images((12, 8))
    keep = jnp.array([[4, 1, 2], [0, 5, 3]])
    logits, out = model.apply(params, x, keep=keep)
    cfg = model.config
    assert out["encoded"].shape == (2, cfg.prefix + 3, 16)
    whole = model.apply(params, x)[1]["embedded"]
    patches = [whole[i, cfg.prefix :][keep[i]] for i in range(2)]
    np.testing.assert_array_equal(out["embedded"][:, cfg.prefix :], jnp.stack(patches))
    # What was left out has no influence, and the order of what is kept none either.
    y, column = divmod(3, 2)  # patch 3 of the first image
    changed = x.at[0, 4 * y : 4 * y + 4, 4 * column : 4 * column + 4].add(1.0)
    np.testing.assert_array_equal(model.apply(params, changed, keep=keep)[0], logits)
    assert np.abs(model.apply(params, changed)[0] - model.apply(params, x)[0])[0].max() > 1e-3
    np.testing.assert_allclose(model.apply(params, x, keep=keep[:, ::-1])[0], logits, atol=1e-5)
    everything = jnp.broadcast_to(jnp.arange(6), (2, 6))
    np.testing.assert_array_equal(
        model.apply(params, x, keep=everything)[0], model.apply(params, x)[0]
    )


@pytest.mark.parametrize("changes", [{"posemb_at": "layers"}, {"relative": "bias"}], ids=str)
def test_patches_cannot_be_left_out_where_layers_add_positions(changes):
    model = registry.build(dataclasses.replace(CFG, **changes))
    with pytest.raises(UserError, match="use 'stem' and 'none'"):
        model.apply(random_params(model), images((12, 8)), keep=jnp.zeros((2, 3), int))


def test_a_mixer_has_one_size_and_all_patches():
    cfg = MixerConfig((8, 8), 1, 4, 1, 8, 4, 8, 2)
    model = mixer.build(cfg)
    with pytest.raises(
        UserError, match=r"takes images of \(8, 8\) pixels, and none of \(12, 8"
    ):
        model.at((12, 8))
    with pytest.raises(UserError, match="use a Vision Transformer"):
        model.apply(model.init(KEY), images((8, 8)), keep=jnp.zeros((2, 3), int))
