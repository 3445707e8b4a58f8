"""Our ResNet feature maps against the backbone of timm's hybrids, with the same weights."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from vit_jax.models import resnet

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, on import of timm
]
torch = pytest.importorskip("torch")


class Features(nn.Module):
    block_sizes: tuple[int, ...]
    width_factor: int

    @nn.compact
    def __call__(self, images):
        return resnet.resnet_features(images, self.block_sizes, self.width_factor, "float32")


def randomize(module):
    """Random weights, kernels off centre so that their standardisation has work to do."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.3 + noise if parameter.ndim > 1 else 0.7 + 0.3 * noise
    return module.eval()


def backbone(block_sizes, width_factor):
    """What `vit_base_r50_s16` and its like of timm cut their patches from."""
    pytest.importorskip("timm")
    from timm.layers import StdConv2dSame
    from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem

    convolution = functools.partial(StdConv2dSame, eps=1e-8)
    if not block_sizes:
        return create_resnetv2_stem(
            3, 64 * width_factor, stem_type="same", preact=False, conv_layer=convolution
        )
    return ResNetV2(
        block_sizes,
        channels=(256, 512, 1024, 2048)[: len(block_sizes)],
        num_classes=0,
        global_pool="",
        width_factor=width_factor,
        stem_type="same",
        preact=False,
        conv_layer=convolution,
    )


def place(name):
    """Where our tree keeps timm's `name`."""
    parts = name.removeprefix("stem.").split(".")
    leaf = "scale" if parts[-1] == "weight" else "bias"
    if parts[0] != "stages":
        return ("conv_root", "kernel") if parts[0] == "conv" else ("gn_root", leaf)
    _, stage, _, unit, layer, *rest = parts
    if layer == "downsample":
        layer = f"{rest[0]}_proj"
    layer = layer.replace("norm", "gn")
    leaf = "kernel" if layer.startswith("conv") else leaf
    return f"block{int(stage) + 1}", f"unit{int(unit) + 1}", layer, leaf


def tree(arrays):
    params = {}
    for name, array in arrays.items():
        *path, leaf = place(name)
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return params


@pytest.mark.parametrize(
    ("block_sizes", "width_factor", "image_size"),
    [((), 1, (64, 48)), ((2, 1), 1, (48, 32)), ((1, 1), 2, (37, 30))],
)
def test_features_and_gradients_equal_timms(block_sizes, width_factor, image_size):
    theirs = randomize(backbone(block_sizes, width_factor))
    params = tree({name: p.detach().numpy() for name, p in theirs.named_parameters()})
    x = np.random.default_rng(0).standard_normal((2, *image_size, 3)).astype(np.float32)
    features = Features(block_sizes, width_factor)
    expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    weights = np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32)
    (expected * torch.from_numpy(weights)).sum().backward()

    def loss(params):
        y = features.apply({"params": params}, x)
        return (y * weights.transpose(0, 2, 3, 1)).sum(), y

    gradients, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = expected.detach().numpy().transpose(0, 2, 3, 1)
    # timm divides by sqrt(variance + 1e-8), we by deviation + 1e-5, and its normalisation has
    # eps 1e-5 for our 1e-6; at these widths all of that is 2e-6 of the largest feature.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    expected_gradients = tree({n: p.grad.numpy() for n, p in theirs.named_parameters()})
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    # 4e-6 as a rule, but 1e-3 where one activation is so near zero that rounding decides its
    # sign; which inputs meet that depends on the processor.
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        assert np.linalg.norm(a - b) < 5e-3 * np.linalg.norm(b)
