"""Small networks of timm and Hugging Face with random weights, and ours to compare with."""

import re

import jax
import numpy as np
import pytest

from vit_jax.models import vit

torch = pytest.importorskip("torch")

SIZES = [
    {"width": 64, "depth": 2, "heads": 2, "mlp_dim": 128, "patch": 8},
    {"width": 60, "depth": 3, "heads": 5, "mlp_dim": 100, "patch": 4},
]


def randomize(module):
    """Random everything, zeros and ones included, so that no array can be mistaken."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        scale = 0.05 if parameter.ndim > 1 else 0.2
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = offset + scale * noise
    return module.eval()


def images(size, channels=3):
    x = np.random.default_rng(0).standard_normal((2, *size, channels)).astype(np.float32)
    return x, torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def assert_close(found, expected):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


def compute(cfg, params, x):
    return jax.jit(vit.build(cfg).apply)(params, x)


def ours(imported, x):
    return compute(imported.cfg, imported.params, x)


def timm_model(shape, image_size, kind="vit", **options):
    library = pytest.importorskip("timm")
    network = library.models.VisionTransformer
    if kind == "deit_distilled":
        network = library.models.deit.VisionTransformerDistilled
    if kind.startswith("beit"):
        network = library.models.beit.Beit
    if options.pop("swiglu", False):
        options |= {"mlp_layer": library.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    return randomize(
        network(
            img_size=image_size,
            patch_size=shape["patch"],
            embed_dim=shape["width"],
            depth=shape["depth"],
            num_heads=shape["heads"],
            **{"num_classes": 7, "mlp_ratio": shape["mlp_dim"] / shape["width"]} | options,
        )
    )


def hf_model(name, shape, image_size, **options):
    library = pytest.importorskip("transformers")
    config = getattr(library, re.sub(r"For.*", "Model", name))
    mlp = {"intermediate_size": shape["mlp_dim"]}
    if "Dinov2" in name:
        mlp = {"mlp_ratio": 2}
    config = config.config_class(
        image_size=image_size if image_size[0] != image_size[1] else image_size[0],
        patch_size=shape["patch"],
        hidden_size=shape["width"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"],
        **mlp | options,
    )
    return randomize(getattr(library, name)(config))
