"""torchvision's Vision Transformers and OpenCLIP's image towers, read by us; timm's channels.

torchvision's model where it can be imported, and besides a module of torch's own layers in the
names of both, so that nothing depends on either.
"""

import numpy as np
import pytest

from tests.parity.networks import assert_close, images, ours, randomize, timm_model
from vit_jax.checkpoints import trained
from vit_jax.interop.channels import adapt_first
from vit_jax.interop.load import load_weights
from vit_jax.models.resize_positions import resize_params
from vit_jax.system.errors import UserError

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, on import
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
torch = pytest.importorskip("torch")
nn = torch.nn
SHAPE = {"width": 64, "depth": 2, "heads": 2, "mlp_dim": 128, "patch": 8}


class Tower(nn.Module):
    """A ViT of torch's own layers; `names` is `torchvision` or `openclip`."""

    def __init__(self, names, grid, width=64, depth=2, heads=2, hidden=128, outputs=5):
        super().__init__()
        clip = names == "openclip"
        self.names, self.depth = names, depth
        epsilon = 1e-5 if clip else 1e-6
        norm = lambda: nn.LayerNorm(width, eps=epsilon)
        self.parts = nn.ModuleDict({"conv": nn.Conv2d(3, width, 8, 8, bias=not clip)})
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + 1, width))
        for i in range(depth):
            self.parts[f"{i}_ln_1"], self.parts[f"{i}_ln_2"] = norm(), norm()
            self.parts[f"{i}_attention"] = nn.MultiheadAttention(width, heads, batch_first=True)
            self.parts[f"{i}_fc"] = nn.Linear(width, hidden)
            self.parts[f"{i}_out"] = nn.Linear(hidden, width)
        self.parts["ln"] = norm()
        self.parts["head"] = nn.Linear(width, outputs, bias=not clip)

    def forward(self, x):
        p = self.parts
        x = p["conv"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for i in range(self.depth):
            y = p[f"{i}_ln_1"](x)
            x = x + p[f"{i}_attention"](y, y, y, need_weights=False)[0]
            y = p[f"{i}_out"](nn.functional.gelu(p[f"{i}_fc"](p[f"{i}_ln_2"](x))))
            x = x + y
        return p["head"](p["ln"](x)[:, 0])

    def published(self):
        """The state dict in their names."""
        clip = self.names == "openclip"
        block = (
            "visual.transformer.resblocks.{}." if clip else "encoder.layers.encoder_layer_{}."
        )
        top = {"conv": "visual.conv1" if clip else "conv_proj"}
        top["ln"] = "visual.ln_post" if clip else "encoder.ln"
        inside = {
            "attention": "attn" if clip else "self_attention",
            "ln_1": "ln_1",
            "ln_2": "ln_2",
        }
        inside |= {
            "fc": "mlp.c_fc" if clip else "mlp.0",
            "out": "mlp.c_proj" if clip else "mlp.3",
        }
        state = {}
        for name, value in self.state_dict().items():
            if name == "cls":
                key = "visual.class_embedding" if clip else "class_token"
                state[key] = value.reshape(-1) if clip else value
            elif name == "positions":
                key = "visual.positional_embedding" if clip else "encoder.pos_embedding"
                state[key] = value[0] if clip else value
            elif name.startswith("parts.head."):
                key = "visual.proj" if clip else name.replace("parts.head", "heads.head")
                state[key] = value.T.contiguous() if clip else value
            else:
                part, _, rest = name.removeprefix("parts.").partition(".")
                number, _, layer = part.partition("_")
                start = block.format(number) + inside[layer] if layer else top[part]
                state[f"{start}.{rest}"] = value
        return state


@pytest.mark.parametrize("image_size", [(32, 32), (16, 64)])
@pytest.mark.parametrize("names", ["torchvision", "openclip"])
@pytest.mark.parametrize("wrap", ["", "module."])
def test_both_names_compute_the_same(tmp_path, names, image_size, wrap):
    theirs = randomize(Tower(names, (image_size[0] // 8, image_size[1] // 8)))
    state = {wrap + name: x for name, x in theirs.published().items()}
    if names == "openclip":  # the whole of CLIP, with its text
        state |= {f"{wrap}transformer.resblocks.0.ln_1.weight": torch.ones(8)}
        state |= {f"{wrap}token_embedding.weight": torch.ones(9, 8)}
    torch.save(state, tmp_path / "w.pth")
    found = load_weights(tmp_path / "w.pth", image_size, 2)
    assert found.family == names
    assert found.cfg.layer_norm_eps == (1e-5 if names == "openclip" else 1e-6)
    assert found.value_range == ("openclip" if names == "openclip" else "imagenet")
    assert any("shared with text" in note for note in found.notes) == (names == "openclip")
    x, tensor = images(image_size)
    assert_close(ours(found, x)[0], theirs(tensor))


def test_a_norm_before_the_blocks_is_the_reason(tmp_path):
    state = randomize(Tower("openclip", (4, 4))).published()
    state["visual.ln_pre.weight"] = torch.ones(64)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"a LayerNorm before the first block \(CLIP's ln_pre\)"
    ):
        load_weights(tmp_path / "w.pth", num_heads=2)


@pytest.mark.parametrize("old_names", [False, True])
def test_torchvisions_own_model(tmp_path, old_names):
    pytest.importorskip("torchvision")
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    make = lambda size: VisionTransformer(size, 8, 2, 2, 64, 128, num_classes=5)
    theirs = randomize(make(32))
    state = dict(theirs.state_dict())
    if old_names:
        for old, new in (("mlp.0.", "mlp.linear_1."), ("mlp.3.", "mlp.linear_2.")):
            state = {name.replace(old, new): x for name, x in state.items()}
    torch.save(state, tmp_path / "w.pth")
    found = load_weights(tmp_path / "w.pth", num_heads=2)
    x, tensor = images((32, 32))
    assert_close(ours(found, x)[0], theirs(tensor))
    larger = make(48)
    larger.load_state_dict(interpolate_embeddings(48, 8, theirs.state_dict()))
    resized = trained.at_input_size(trained.dataclasses.replace(found, input_size=(48, 48)))
    x, tensor = images((48, 48))
    assert_close(ours(resized, x)[0], larger.eval()(tensor))
    assert resize_params(found.params, found.cfg, found.cfg) is found.params


def test_torchvisions_tanh_layer(tmp_path):
    pytest.importorskip("torchvision")
    from torchvision.models.vision_transformer import VisionTransformer

    theirs = randomize(
        VisionTransformer(32, 8, 2, 2, 64, 128, num_classes=5, representation_size=24)
    )
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    found = load_weights(tmp_path / "w.pth", num_heads=2)
    x, tensor = images((32, 32))
    assert_close(ours(found, x)[0], theirs(tensor))


@pytest.mark.parametrize("before", [1, 3, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 8])
def test_channels_are_adapted_as_timm_adapts_them(before, after):
    pytest.importorskip("timm")
    from timm.models._manipulate import adapt_input_conv

    kernel = torch.randn(16, before, 4, 4, generator=torch.Generator().manual_seed(0))
    params = {"embedding": {"kernel": kernel.numpy().transpose(2, 3, 1, 0)}, "head": {}}
    expected = adapt_input_conv(after, kernel.clone(), base_chans=before)
    found, note = adapt_first(params, before, after)
    found = found["embedding"]["kernel"].transpose(3, 2, 0, 1)
    if before != after:
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6)
        assert f"from {before} to {after} channels" in note


def test_a_grey_image_gives_what_it_gave_in_colours(tmp_path):
    theirs = timm_model(SHAPE, (32, 32))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    found = load_weights(tmp_path / "w.pth", num_heads=2)
    params, _ = adapt_first(found.params, 3, 1)
    cfg = trained.dataclasses.replace(found.cfg, channels=1)
    x, _ = images((32, 32), channels=1)
    grey = trained.dataclasses.replace(found, cfg=cfg, params=params)
    colour = torch.from_numpy(np.repeat(x, 3, axis=3).transpose(0, 3, 1, 2).copy())
    assert_close(ours(grey, x)[0], theirs(colour))
