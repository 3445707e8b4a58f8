"""Our MLP-Mixer against timm's, with the same random weights."""

import functools

import jax
import numpy as np
import pytest

from vit_jax.models import mixer

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, on import of timm
]
torch = pytest.importorskip("torch")


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = offset + 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def dense(state, name):
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def norm(state, name):
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def from_timm(state, depth):
    mlp = lambda name: {f"Dense_{i}": dense(state, f"{name}.fc{i + 1}") for i in (0, 1)}
    blocks = {
        f"MixerBlock_{i}": {
            "LayerNorm_0": norm(state, f"blocks.{i}.norm1"),
            "token_mixing": mlp(f"blocks.{i}.mlp_tokens"),
            "LayerNorm_1": norm(state, f"blocks.{i}.norm2"),
            "channel_mixing": mlp(f"blocks.{i}.mlp_channels"),
        }
        for i in range(depth)
    }
    return blocks | {
        "stem": {
            "kernel": state["stem.proj.weight"].transpose(2, 3, 1, 0),
            "bias": state["stem.proj.bias"],
        },
        "pre_head_layer_norm": norm(state, "norm"),
        "head": dense(state, "head"),
    }


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_logits_and_gradients_equal_timms(gelu):
    pytest.importorskip("timm")
    from timm.models.mlp_mixer import MlpMixer

    activation = functools.partial(
        torch.nn.GELU, approximate={"tanh": "tanh", "erf": "none"}[gelu]
    )
    theirs = randomize(
        MlpMixer(
            num_classes=7,
            img_size=(48, 32),
            patch_size=8,
            num_blocks=3,
            embed_dim=40,
            mlp_ratio=(0.5, 3.0),
            act_layer=activation,
        )
    )
    params = from_timm({n: p.detach().numpy() for n, p in theirs.named_parameters()}, 3)
    cfg = mixer.MixerConfig((48, 32), 3, 8, 3, 40, 20, 120, num_classes=7, gelu=gelu)
    model = mixer.build(cfg)
    x = np.random.default_rng(0).standard_normal((2, 48, 32, 3)).astype(np.float32)
    expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    expected.square().sum().backward()

    def loss(params):
        logits, _ = model.apply(params, x)
        return (logits**2).sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = expected.detach().numpy()
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    expected_gradients = from_timm({n: p.grad.numpy() for n, p in theirs.named_parameters()}, 3)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradients))
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest)
