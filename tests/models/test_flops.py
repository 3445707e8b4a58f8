"""Counted operations against those that the traced program really holds."""

import math

import jax
import jax.numpy as jnp
import pytest

from vit_jax import config as configuration
from vit_jax.models import flops, registry


def configure(variant, size=(224, 224), classes=1000, **fields):
    config = configuration.get_config()
    config.model.update({"variant": variant, **fields})
    return registry.configure(config.model, size, 3, classes)


def programs(equation):
    """The programs inside an operation: a function that was called, the body of a loop."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else [value]:
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def products(program):
    """Twice the multiplications of all products and convolutions of a traced program."""
    total = 0
    for equation in program.eqns:
        inside = sum(products(inner) for inner in programs(equation))
        total += inside * equation.params.get("length", 1)  # of a loop
        shapes = [v.aval.shape for v in equation.invars]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(shapes[0][axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * inner
        if equation.primitive.name == "conv_general_dilated":
            inner = math.prod(shapes[1][:3])  # height, width, in
            total += 2 * math.prod(equation.outvars[0].aval.shape) * inner
    return total


def traced(cfg):
    model = registry.build(cfg)
    params = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *cfg.image_size, cfg.channels), jnp.float32)
    apply = lambda params, images: model.apply(params, images)[0]
    return products(jax.make_jaxpr(apply)(params, images).jaxpr)


@pytest.mark.parametrize(
    ("variant", "size", "fields"),
    [
        ("B/16", (224, 224), {}),
        ("L/16", (224, 224), {"scan": True}),
        ("S/16", (64, 96), {"pool": "gap", "registers": 3, "mlp": "swiglu"}),
        ("S/16", (64, 96), {"pool": "cls_gap", "representation_size": 50}),
        ("S/16", (64, 96), {"pool": "map", "class_token": True, "dtype": "bfloat16"}),
        ("S/16", (64, 64), {"distillation": "heads"}),
        ("S/16", (64, 64), {"distillation": "token", "posemb_at": "layers"}),
        ("S/16", (64, 64), {"relative": "keys", "key_bias": False}),
        ("S/16", (64, 64), {"relative": "bias"}),
        ("Mixer-S/16", (64, 96), {}),
        ("R50x1", (224, 224), {}),
        ("R26x2", (75, 130), {}),
        ("R50+B/16", (64, 96), {}),
        ("R+Ti/16", (64, 96), {}),
    ],
)
def test_every_product_is_counted(variant, size, fields):
    cfg = configure(variant, size, **fields)
    assert flops.forward_flops(cfg) == traced(cfg)


def test_without_classes_there_is_no_head():
    cfg = configure("S/16", (32, 32), classes=0, pool="map")
    assert flops.forward_flops(cfg) == traced(cfg)


@pytest.mark.parametrize(
    ("variant", "size", "published"),
    [
        # Billions of multiply-adds in timm's tables of models.
        ("Ti/16", 224, 1.26),
        ("S/16", 224, 4.61),
        ("B/16", 224, 17.58),
        ("B/32", 224, 4.41),
        ("B/16", 384, 55.54),
        ("L/16", 224, 61.60),
        ("H/14", 224, 167.40),
    ],
)
def test_published_counts(variant, size, published):
    counted = flops.forward_flops(configure(variant, (size, size))) / 2e9
    assert counted == pytest.approx(published, rel=0.006)


def test_an_update_is_three_forward_passes():
    cfg = configure("S/16", (32, 48), depth=2)
    model = registry.build(cfg)
    params = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32)
    loss = lambda params, images: model.apply(params, images)[0].sum()
    # Three times counts the gradient of the pixels too, which nobody asks for.
    found = products(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, images).jaxpr)
    assert found == flops.train_flops(cfg)


def test_xla_counts_the_same_products_and_a_little_beside():
    cfg = configure("mu/4", (16, 16), classes=10, width=64, mlp_dim=256)
    model = registry.build(cfg)
    params = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    program = jax.jit(lambda p, x: model.apply(p, x)[0]).lower(params, images).compile()
    assert 1.0 < program.cost_analysis()["flops"] / flops.forward_flops(cfg) < 1.15
