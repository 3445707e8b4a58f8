"""Hybrids and Mixers of timm: Google's `.npz` carries weights there, their own files back."""

import functools
import json

import jax
import numpy as np
import pytest

from tests.interop.test_hostile import attempt, shuffled
from vit_jax.interop import google, weight_files
from vit_jax.interop.families import expected_shapes, nest
from vit_jax.interop.load import load_weights
from vit_jax.models import registry
from vit_jax.models.variants import decode_hybrid
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, on import of timm
]
torch = pytest.importorskip("torch")


def hybrid(units, patch_size, image_size, **changes):
    """A configuration and random parameters; the kernels of the ResNet are off centre."""
    tiny = {"depth": 2, "width": 64, "mlp_dim": 96, "num_heads": 4, "num_classes": 7}
    cfg = ViTConfig(image_size, 3, patch_size, resnet=units, **tiny | changes)
    rng = np.random.default_rng(0)

    def random(name, shape):
        noise = rng.standard_normal(shape)
        if not name.endswith("/kernel"):
            return (name.endswith("/scale") + 0.2 * noise).astype(np.float32)
        inputs = shape[0] if "/MultiHead" in name and "/out/" not in name else shape[:-1]
        centre = 0.3 if name.startswith(("conv_root", "block")) else 0.0
        return ((centre + noise) / np.sqrt(np.prod(inputs))).astype(np.float32)

    shapes = expected_shapes(cfg)
    return cfg, nest({name: random(name, shape) for name, shape in shapes.items()})


def timms(cfg, **options):
    """The network that timm builds for a hybrid, with its own random weights."""
    pytest.importorskip("timm")
    from timm.layers import HybridEmbed, StdConv2dSame
    from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
    from timm.models.vision_transformer import VisionTransformer

    convolution = functools.partial(StdConv2dSame, eps=1e-8)
    if cfg.resnet:
        backbone = ResNetV2(
            cfg.resnet,
            channels=(256, 512, 1024, 2048)[: len(cfg.resnet)],
            num_classes=0,
            global_pool="",
            stem_type="same",
            preact=False,
            conv_layer=convolution,
        )
    else:
        backbone = create_resnetv2_stem(
            3, stem_type="same", preact=False, conv_layer=convolution
        )
    cell = 4 * 2 ** max(len(cfg.resnet) - 1, 0)
    return VisionTransformer(
        img_size=cfg.image_size,
        patch_size=cfg.patch_size // cell,
        embed_dim=cfg.width,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        mlp_ratio=cfg.mlp_dim / cfg.width,
        num_classes=cfg.num_classes,
        embed_layer=functools.partial(HybridEmbed, backbone=backbone),
        **options,
    ).eval()


def images(cfg):
    """Noise, and noise that grows darker from left to right."""
    x = np.random.default_rng(1).standard_normal((2, *cfg.image_size, 3)).astype(np.float32)
    x[1] = -np.sort(-x[1], axis=1)
    return x


def ours(cfg, params):
    return jax.jit(registry.build(cfg).apply)(params, images(cfg))[0]


def deviation(found, cfg, theirs):
    """The largest difference of logits on two random images, of the largest logit."""
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images(cfg).transpose(0, 3, 1, 2).copy())).numpy()
    assert found.shape == expected.shape
    largest = np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 0.1 * largest  # they see the images
    return np.abs(found - expected).max() / largest


def with_our_epsilons(theirs, monkeypatch):
    """timm's network as it would be with the epsilons of Google's."""
    from timm.layers import StdConv2dSame

    def forward(self, x):
        high, wide = (
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, stride, kernel in zip(
                x.shape[2:], self.stride, self.kernel_size, strict=True
            )
        )
        sides = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
        x = torch.nn.functional.pad(x, sides)
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        kernel = (self.weight - mean) / (deviation + 1e-5)
        return torch.nn.functional.conv2d(x, kernel, stride=self.stride)

    monkeypatch.setattr(StdConv2dSame, "forward", forward)
    for module in theirs.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-6
    return theirs


# Small images with as many patches as 224 x 224 and 384 x 384 pixels have at 32, and oblong.
@pytest.mark.parametrize(
    ("units", "patch_size", "image_size"),
    [((), 8, (56, 56)), ((), 8, (96, 96)), ((2, 1), 8, (24, 56)), ((1, 1, 1), 16, (32, 48))],
)
def test_logits_equal_timms_through_googles_file(
    tmp_path, monkeypatch, units, patch_size, image_size
):
    cfg, params = hybrid(units, patch_size, image_size)
    google.write(tmp_path / "w.npz", cfg, params)
    theirs = timms(cfg, act_layer="gelu_tanh")
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    found = ours(cfg, params)
    assert deviation(found, cfg, theirs) < 1e-4  # 2e-5 here, 1e-4 at the size of R50+B/16
    assert deviation(found, cfg, with_our_epsilons(theirs, monkeypatch)) < 1e-5


def test_logits_of_the_published_tiny_hybrid_at_its_full_size(tmp_path):
    pytest.importorskip("timm")
    from timm.models.vision_transformer_hybrid import vit_tiny_r_s16_p8_224

    units, variant, patch_size = decode_hybrid("R+Ti/16")
    cfg, params = hybrid(
        units, patch_size, (224, 224), **variant._asdict() | {"num_classes": 1000}
    )
    google.write(tmp_path / "w.npz", cfg, params)
    theirs = vit_tiny_r_s16_p8_224(act_layer="gelu_tanh").eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    assert (
        deviation(ours(cfg, params), cfg, theirs) < 1e-5
    )  # its ResNet is a single convolution: little for epsilons to change


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = offset + (0.2 if parameter.ndim > 1 else 0.3) * noise
    return module


def arrays_of(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("units", "patch_size", "image_size", "prefix"),
    [((), 16, (64, 64), "module."), ((1, 1), 8, (32, 40), "")],
)
def test_timms_own_files_are_read(tmp_path, units, patch_size, image_size, prefix):
    cfg, _ = hybrid(units, patch_size, image_size, gelu="erf")
    theirs = randomize(timms(cfg))
    state = {prefix + name: value for name, value in arrays_of(theirs).items()}
    weight_files.write_safetensors(tmp_path / "w", state)
    found = load_weights(tmp_path / "w", image_size, num_heads=4)
    assert (found.cfg, found.family) == (cfg, "timm")
    assert "epsilons" in found.notes[-1]
    assert deviation(ours(found.cfg, found.params), cfg, theirs) < 1e-4


def test_the_config_beside_a_hybrid_is_used(tmp_path):
    cfg, _ = hybrid((1,), 8, (32, 32))
    theirs = randomize(timms(cfg))
    weight_files.write_safetensors(tmp_path / "model.safetensors", arrays_of(theirs))
    config = {
        "architecture": "vit_small_r26_s32_224",
        "model_args": {"act_layer": "gelu_tanh", "num_heads": 2},
        "pretrained_cfg": {"crop_pct": 0.5, "interpolation": "bicubic"},
        "label_names": list("abcdefg"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_weights(tmp_path)
    assert (found.cfg.num_heads, found.cfg.gelu, found.cfg.patch_size) == (2, "tanh", 8)
    assert found.eval_transform.startswith("resize_shorter(64, method='bicubic')|center_crop")
    assert found.class_names == tuple("abcdefg")


@pytest.mark.parametrize("units", [(), (1, 1)])
def test_what_is_wrong_in_the_backbone_is_listed(tmp_path, units):
    cfg, _ = hybrid(units, 8, (32, 32))
    state = arrays_of(timms(cfg))
    stem = "patch_embed.backbone." + ("stem." if units else "")
    state["patch_embed.backbone.fc.bias"] = state.pop(f"{stem}norm.bias")
    state[f"{stem}norm.weight"] = np.zeros((3, 3), np.float32)
    weight_files.write_safetensors(tmp_path / "w", state)
    with pytest.raises(UserError) as error:
        load_weights(tmp_path / "w", num_heads=4)
    message = str(error.value)
    assert "norm.bias is missing" in message
    assert "fc.bias is unknown" in message
    assert "norm.weight has shape (3, 3), not (64,)" in message


def test_other_backbones_are_refused(tmp_path):
    cfg, _ = hybrid((1,), 8, (32, 32))
    state = arrays_of(timms(cfg))
    deep = {n.replace("stem.conv.", "conv1.0."): x for n, x in state.items()}
    weight_files.write_safetensors(tmp_path / "w", deep)
    with pytest.raises(UserError, match="do not come from a ResNet with weight standard"):
        load_weights(tmp_path / "w", num_heads=4)
    more = {n.replace("stages.0", "stages.1"): x for n, x in state.items()} | state
    weight_files.write_safetensors(tmp_path / "w", more)
    with pytest.raises(UserError, match="256 channels after 2 stages"):
        load_weights(tmp_path / "w", num_heads=4)


@pytest.mark.parametrize("kind", ["hybrid", "mixer"])
def test_any_wrong_array_is_a_sentence(tmp_path, kind):
    module = timms_mixer() if kind == "mixer" else timms(hybrid((1,), 8, (32, 32))[0])
    state, rng = arrays_of(module), np.random.default_rng(0)
    for _ in range(100):
        weight_files.write_npz(tmp_path / "w", shuffled(state, rng))
        attempt(lambda path: load_weights(path, num_heads=4), tmp_path / "w")


# ---- Mixers --------------------------------------------------------------------------------


def timms_mixer(**options):
    pytest.importorskip("timm")
    from timm.models.mlp_mixer import MlpMixer

    shape = {"num_classes": 7, "img_size": (32, 32), "patch_size": 8, "num_blocks": 2}
    shape |= {"embed_dim": 40, "mlp_ratio": (0.5, 3.0)}
    return randomize(MlpMixer(**shape | options)).eval()


@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 0}, {"img_size": (32, 48), "patch_size": 16}]
)
def test_timms_mixers_are_read(tmp_path, options):
    theirs = timms_mixer(**options)
    weight_files.write_safetensors(tmp_path / "w", arrays_of(theirs))
    image_size = options.get("img_size", (32, 32))
    found = load_weights(tmp_path / "w", image_size)
    assert (found.family, found.notes) == ("timm", ())
    assert (found.cfg.image_size, found.cfg.gelu) == (image_size, "erf")
    assert deviation(ours(found.cfg, found.params), found.cfg, theirs) < 1e-5
    google.write(tmp_path / "again.npz", found.cfg, found.params)
    again = load_weights(tmp_path / "again.npz", image_size)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


def test_other_mixers_are_refused(tmp_path):
    state = arrays_of(timms_mixer(stem_norm=True))
    del state["blocks.1.norm2.bias"]
    weight_files.write_safetensors(tmp_path / "w", state)
    with pytest.raises(
        UserError, match=r"blocks\.1\.norm2\.bias is missing; stem\.norm\.\w+ is"
    ):
        load_weights(tmp_path / "w")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "mixer_b16_224", "model_args": {"act_layer": "relu"}})
    )
    with pytest.raises(UserError, match="its activation is 'relu'"):
        load_weights(tmp_path / "w")
