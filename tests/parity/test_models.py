"""Our logits against timm's and Hugging Face's, with the same random weights."""

import jax
import numpy as np
import pytest

from vit_jax.models import vit

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")


def randomize(module):
    """Random everything, zeros and ones included, so that no array can be mistaken."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        scale = 0.02 if parameter.ndim > 1 else 0.1
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = offset + scale * noise
    return module.eval()


def dense(state, name):
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def norm(state, name):
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def attention(projections, out, heads):
    """Per-head kernels from (D, D) matrices stored as torch stores them, out features first."""
    width = out["kernel"].shape[1]
    split = lambda p: {
        "kernel": p["kernel"].reshape(width, heads, -1),
        "bias": p["bias"].reshape(heads, -1),
    }
    joined = {"kernel": out["kernel"].reshape(heads, -1, width), "bias": out["bias"]}
    return {name: split(p) for name, p in projections.items()} | {"out": joined}


def from_timm(state, depth, heads):
    encoder = {
        "posembed_input": {"pos_embedding": state["pos_embed"]},
        "encoder_norm": norm(state, "norm"),
    }
    for i in range(depth):
        block = f"blocks.{i}"
        qkv = dense(state, f"{block}.attn.qkv")
        thirds = {
            name: {"kernel": k, "bias": b}
            for name, k, b in zip(
                ("query", "key", "value"),
                np.split(qkv["kernel"], 3, axis=1),
                np.split(qkv["bias"], 3),
                strict=True,
            )
        }
        out = dense(state, f"{block}.attn.proj")
        encoder[f"encoderblock_{i}"] = {
            "LayerNorm_0": norm(state, f"{block}.norm1"),
            "MultiHeadDotProductAttention_0": attention(thirds, out, heads),
            "LayerNorm_1": norm(state, f"{block}.norm2"),
            "MlpBlock_0": {
                "Dense_0": dense(state, f"{block}.mlp.fc1"),
                "Dense_1": dense(state, f"{block}.mlp.fc2"),
            },
        }
    return {
        "cls": state["cls_token"],
        "embedding": {
            "kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "bias": state["patch_embed.proj.bias"],
        },
        "Transformer": encoder,
        "head": dense(state, "head"),
    }


def arrays(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


def relative_difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on import of timm
@pytest.mark.parametrize("image_size", [(224, 224), (64, 160)])
@pytest.mark.parametrize(("width", "heads"), [(192, 3), (60, 5)])
def test_logits_and_gradients_equal_timms(image_size, width, heads):
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(
        img_size=image_size,
        patch_size=16,
        embed_dim=width,
        depth=4,
        num_heads=heads,
        num_classes=10,
    )
    params = from_timm(arrays(randomize(theirs)), 4, heads)
    cfg = vit.ViTConfig(
        image_size, 3, 16, 4, width, 4 * width, heads, num_classes=10, gelu="erf"
    )
    ours = vit.build(cfg)
    x = np.random.default_rng(0).standard_normal((2, *image_size, 3)).astype(np.float32)
    logits, _ = ours.apply(params, x)
    expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    assert relative_difference(logits, expected.detach().numpy()) < 1e-5

    expected.square().sum().backward()
    gradients = jax.grad(lambda p: (ours.apply(p, x)[0] ** 2).sum())(params)
    named = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    expected_gradients = from_timm(named, 4, heads)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradients))
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on import of transformers
def test_logits_and_attention_equal_hugging_faces():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=200,
        num_labels=7,
        attn_implementation="eager",
    )
    theirs = randomize(transformers.ViTForImageClassification(config))
    assert config.layer_norm_eps == 1e-12
    state = {name.removeprefix("vit."): value for name, value in arrays(theirs).items()}
    encoder = {
        "posembed_input": {"pos_embedding": state["embeddings.position_embeddings"]},
        "encoder_norm": norm(state, "layernorm"),
    }
    for i in range(3):
        block = f"layers.{i}"
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
        projections = {
            ours: dense(state, f"{block}.attention.{name}") for ours, name in names.items()
        }
        out = dense(state, f"{block}.attention.o_proj")
        encoder[f"encoderblock_{i}"] = {
            "LayerNorm_0": norm(state, f"{block}.layernorm_before"),
            "MultiHeadDotProductAttention_0": attention(projections, out, 4),
            "LayerNorm_1": norm(state, f"{block}.layernorm_after"),
            "MlpBlock_0": {
                "Dense_0": dense(state, f"{block}.mlp.fc1"),
                "Dense_1": dense(state, f"{block}.mlp.fc2"),
            },
        }
    projection = "embeddings.patch_embeddings.projection"
    params = {
        "cls": state["embeddings.cls_token"],
        "embedding": {
            "kernel": state[f"{projection}.weight"].transpose(2, 3, 1, 0),
            "bias": state[f"{projection}.bias"],
        },
        "Transformer": encoder,
        "head": dense(state, "classifier"),
    }
    cfg = vit.ViTConfig(
        (64, 64), 3, 8, 3, 96, 200, 4, num_classes=7, gelu="erf", layer_norm_eps=1e-12
    )
    x = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    logits, out = vit.build(cfg).apply(params, x, return_attention=True)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)), output_attentions=True)
    assert relative_difference(logits, expected.logits.numpy()) < 1e-5
    for i, weights in enumerate(expected.attentions):
        assert relative_difference(out[f"encoderblock_{i}/attention"], weights.numpy()) < 1e-5
