"""Names of variants and the networks that they stand for."""

import jax
import numpy as np
import pytest

from vit_jax import config as configuration
from vit_jax.models import registry
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.model import count_parameters
from vit_jax.models.resnet import ResNetConfig
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError


def configure(variant, size=224, classes=1000, **fields):
    config = configuration.get_config()
    config.model.update({"variant": variant, **fields})
    return registry.configure(config.model, (size, size), 3, classes)


def count(cfg):
    return count_parameters(jax.eval_shape(registry.build(cfg).init, jax.random.key(0)))


@pytest.mark.parametrize(
    ("variant", "tokens", "with_head", "headless"),
    [
        ("R+Ti/16", 49, 6_337_704, 6_144_704),
        ("R26+S/32", 49, 36_431_912, 36_046_912),
        ("R26+B/32", 49, 101_383_976, 100_614_976),
        ("R50+B/16", 196, 98_659_112, 97_890_112),
        ("R50+L/32", 49, 328_994_856, 327_969_856),
    ],
)
def test_hybrids_have_the_published_counts(variant, tokens, with_head, headless):
    cfg = configure(variant)
    assert isinstance(cfg, ViTConfig)
    assert np.prod(cfg.grid) == tokens
    assert (count(cfg), count(configure(variant, classes=0))) == (with_head, headless)


def test_a_hybrid_with_the_pre_training_head():
    assert count(configure("R50+B/16", classes=21_843)) == 114_687_379
    cfg = configure("R50+B/16", classes=21_843, representation_size=768)
    assert count(cfg) == 115_277_971


@pytest.mark.parametrize(
    "variant",
    ["B/16", "R50+B/16", "R+Ti/16", "R26+S/32", "R101+L/16", "R50x1", "R152x2", "Mixer-B/16"],
)
def test_names_and_configurations_go_both_ways(variant):
    cfg = configure(variant)
    kinds = {"Mixer": MixerConfig, "R50x1": ResNetConfig, "R152x": ResNetConfig}
    assert type(cfg) is kinds.get(variant[:5], ViTConfig)
    fields = registry.fields_of(cfg)
    assert fields["variant"] == registry.variant_name(cfg) == variant
    assert configure(**fields) == cfg


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("B/16", {"width": 96, "num_heads": 3}),
        ("R50+B/16", {"resnet": (1, 2, 1)}),
        ("R50x1", {"resnet": (1, 1), "resnet_width": 3}),
        ("Mixer-B/16", {"depth": 2, "tokens_mlp_dim": 7}),
    ],
)
def test_a_shape_of_its_own_goes_both_ways_too(variant, changes):
    cfg = configure(variant, **changes)
    assert registry.variant_name(cfg) is None
    assert configure(**registry.fields_of(cfg)) == cfg
    for name, value in changes.items():
        assert getattr(cfg, name) == value


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (
            "R50x1",
            {"pool": "gap"},
            r"model\.pool is 'gap', but a R50x1 has no such thing.*'cls'",
        ),
        ("R50x1", {"depth": 3}, r"model\.depth is 3, but a R50x1"),
        ("Mixer-B/16", {"registers": 2}, r"model\.registers is 2, but a Mixer-B/16"),
        ("R51+B/16", {}, "no such hybrid: use one of R, R26"),
        ("R50+B/14", {}, "no such hybrid"),
        ("R50+X/16", {}, "there is no size 'X'"),
        ("Mixer-X/16", {}, "there is no size 'Mixer-X'"),
        ("R51x1", {}, "there is no size 'R51'"),
        ("B/16", {"resnet": (1, 1, 1, 1)}, r"patches of 16 pixels cannot be cut.*have 32"),
    ],
)
def test_what_does_not_fit_is_one_sentence(variant, changes, message):
    with pytest.raises(UserError, match=message):
        configure(variant, **changes)


@pytest.mark.parametrize("variant", ["R50+B/16", "R+Ti/16"])
def test_a_hybrid_attends_to_the_map_of_its_resnet(variant):
    """The tokens are the ResNet's features, cut into patches and projected."""
    shape = {"depth": 1, "width": 16, "mlp_dim": 8, "num_heads": 2}
    units = {"resnet": (1, 1, 1)} if variant == "R50+B/16" else {}
    cfg = configure(variant, size=64, classes=3, **shape, **units)
    model = registry.build(cfg)
    params = model.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    logits, out = model.apply(params, images)
    assert logits.shape == (2, 3)
    stem = registry.build(ResNetConfig((64, 64), 3, cfg.resnet, 1, 0))
    front = {k: v for k, v in params.items() if k.endswith("root") or k.startswith("block")}
    _, maps = stem.apply(front, images)
    features = maps[f"block{len(cfg.resnet)}" if cfg.resnet else "root"]
    rows, columns = cfg.grid
    patch = features.shape[1] // rows
    kernel = params["embedding"]["kernel"]
    assert kernel.shape == (patch, patch, features.shape[-1], 16)
    cells = np.asarray(features).reshape(2, rows, patch, columns, patch, -1).swapaxes(2, 3)
    expected = np.einsum("brcijf,ijfd->brcd", cells, kernel).reshape(2, rows * columns, 16)
    np.testing.assert_allclose(out["patch_embedding"], expected, atol=1e-4)


@pytest.mark.parametrize("size", [(), (224,), (224, 224, 3), ("224", 224)])
def test_an_image_size_is_a_height_and_a_width(size):
    with pytest.raises(UserError, match=r"image_size is .*: use \(height, width\)"):
        registry.configure(configuration.get_config().model, size, 3, 10)


def test_a_shape_of_no_number_is_one_sentence():
    with pytest.raises(UserError, match=r"model\.channels is None: it must be at least 1"):
        registry.configure(configuration.get_config().model, (224, 224), None, 10)
