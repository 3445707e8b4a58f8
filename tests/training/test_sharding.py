"""Every way to divide a run over devices gives the same run."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from vit_jax import config as configuration
from vit_jax.checkpoints.directory import Checkpoints, abstract
from vit_jax.distributed import sharding
from vit_jax.models import registry
from vit_jax.models.vit import unstack_layers
from vit_jax.objectives.classification import Classification
from vit_jax.system.errors import UserError
from vit_jax.training import program
from vit_jax.training.step import init_state, make_train_step

# Not Adam: the gradient of a key's bias is zero but for rounding, which Adam would blow up.
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
MESHES = {
    "data 8": (8, 1, 1),
    "fsdp 8": (1, 8, 1),
    "data 2 x fsdp 2 x tensor 2": (2, 2, 2),
    "tensor 4": (2, 1, 4),
}
NETWORKS = {
    "plain": {"variant": "B/16"},
    "scanned": {"variant": "B/16", "scan": True},
    "hybrid": {"variant": "R50+B/16", "resnet": (1,)},
}


def mesh_of(data=1, fsdp=1, tensor=1):
    shape = configuration.get_config().mesh
    shape.data, shape.fsdp, shape.tensor = data, fsdp, tensor
    return sharding.make_mesh(shape, jax.devices()[: data * fsdp * tensor])


def network(**fields):
    model = configuration.get_config().model
    small = {"depth": 2, "width": 32, "mlp_dim": 64, "num_heads": 4, "pool": "gap"}
    model.update({"scan": False, "remat": "none", **small, **fields})
    return registry.build(registry.configure(model, (32, 32), 1, 8))


def batch(seed, size=16):
    rng = np.random.default_rng(seed)
    return {
        "image": np.float32(rng.standard_normal((size, 32, 32, 1))),
        "label": np.int32(rng.integers(0, 8, size)),
    }


@functools.cache
def curve(axes, which, accumulation=1, remat="none", steps=4):
    """Losses, final weights, and the most bytes of weights on a device, of a short run."""
    mesh = mesh_of(*axes)
    goal = Classification(network(**NETWORKS[which], remat=remat))
    init = lambda: init_state(goal, OPTIMIZER, 0, True)
    where = sharding.shardings(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=where)()
    step = make_train_step(
        goal, OPTIMIZER, lambda s: 0.1, lambda batch, key: batch,
        seed=0, accumulation=accumulation, ema_decay=0.5,
    )  # fmt: skip
    step = jax.jit(
        sharding.seeing(mesh, step),
        donate_argnums=0,
        out_shardings=(where, sharding.replicated(mesh)),
    )
    losses = []
    for i in range(steps):
        state, metrics = step(state, sharding.put_batch(batch(i), mesh))
        losses.append(float(metrics["train/loss"]))
    assert step._cache_size() == 1
    device = mesh.devices.flat[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    assert held == sharding.bytes_per_device(jax.eval_shape(init), mesh)
    params = jax.device_get(state.ema["model"])
    return (
        losses,
        unstack_layers(params) if "encoderblock" in params["Transformer"] else params,
        held,
    )


@pytest.mark.parametrize(
    ("axes", "which"),
    [
        pytest.param(
            axes,
            which,
            id=f"{mesh}-{which}",
            # A hybrid takes long to compile: in the common run it meets one mesh only.
            marks=[pytest.mark.slow] if which == "hybrid" and axes != (2, 2, 2) else [],
        )
        for mesh, axes in MESHES.items()
        for which in NETWORKS
    ],
)
def test_every_mesh_gives_the_curve_and_the_weights_of_one_device(axes, which):
    losses, params, whole = curve((1, 1, 1), which)
    other_losses, other_params, held = curve(axes, which)
    assert len(set(losses)) == len(losses)  # it moves
    np.testing.assert_allclose(other_losses, losses, rtol=5e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), other_params, params)
    # Over `tensor` a ResNet in front is not divided.
    most = 1.001 if (axes, which) == ((2, 1, 4), "hybrid") else 0.6
    assert held == whole if axes == (8, 1, 1) else held < most * whole


@pytest.mark.parametrize("options", [(2, "none"), (1, "dots"), (2, "full")], ids=str)
@pytest.mark.parametrize("which", ["plain", "scanned"])
def test_so_it_does_with_accumulation_and_recomputation(options, which):
    losses, params, _ = curve((1, 1, 1), which)
    other_losses, other_params, _ = curve((2, 2, 2), which, *options)
    np.testing.assert_allclose(other_losses, losses, rtol=5e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), other_params, params)


def test_rules_divide_each_kind_of_array_as_their_table_says():
    mesh = mesh_of(2, 2, 2)
    block = "opt_state/0/mu/Transformer/encoderblock"  # the optimiser's follow the weights'
    expected = {
        f"{block}/MultiHeadDotProductAttention_0/query/kernel": (
            (12, 768, 12, 64),
            (None, "fsdp", "tensor", None),
        ),
        f"{block}_3/MultiHeadDotProductAttention_0/out/kernel": (
            (12, 64, 768),
            ("tensor", None, "fsdp"),
        ),
        f"{block}/MlpBlock_0/Dense_0/kernel": ((12, 768, 3072), (None, "fsdp", "tensor")),
        f"{block}/MlpBlock_0/Dense_0/bias": ((12, 3072), (None, "tensor")),
        f"{block}/MlpBlock_0/Dense_1/kernel": ((12, 3072, 768), (None, "tensor", "fsdp")),
        f"{block}/MlpBlock_0/Dense_1/bias": ((12, 768), ()),
        f"{block}/LayerNorm_0/scale": ((12, 768), ()),
        "params/embedding/kernel": ((16, 16, 3, 768), (None, None, None, "fsdp")),
        "params/head/kernel": ((768, 1000), ("fsdp", "tensor")),
        "params/head/bias": ((1000,), ("tensor",)),
        "params/Transformer/posembed_input/pos_embedding": ((1, 197, 768), ()),
        "step": ((), ()),
        # 3 heads, 21 classes and 7 channels cannot be halved.
        "params/query/kernel": ((192, 3, 64), ("fsdp", None, None)),
        "params/query/bias": ((3, 64), (None, None)),
        "params/head_dist/kernel": ((192, 21), ("fsdp", None)),
        "params/value/kernel": ((7, 2, 64), (None, "tensor", "fsdp")),
    }
    for path, (shape, axes) in expected.items():
        found = sharding.partition(path, shape, mesh)
        padded = tuple(axes) + (None,) * (len(shape) - len(axes))
        assert tuple(found) + (None,) * (len(shape) - len(found)) == padded, path


def test_a_mesh_is_filled_up_or_refused():
    assert sharding.fill((-1, 2, 2), 8) == (2, 2, 2)
    assert sharding.fill((1, -1, 1), 8) == (1, 8, 1)
    assert mesh_of(2, 2, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    for sizes in [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (2, 2, 1), (-2, 1, 1)]:
        with pytest.raises(UserError, match=f"data={sizes[0]}, fsdp={sizes[1]}"):
            sharding.fill(sizes, 8)


@pytest.mark.parametrize(
    ("platform", "count", "sizes", "expected"),
    [
        ("tpu", 16, (-1, None, 1), 16),
        ("tpu", 256, (-1, None, 1), 16),
        ("tpu", 8, (-1, None, 2), 4),
        ("tpu", 24, (-1, None, 1), 8),
        ("tpu", 16, (4, None, 4), 1),  # who says how many copies says it all
        ("cpu", 16, (-1, None, 1), 1),
        ("gpu", 8, (-1, None, 1), 1),
    ],
)
def test_weights_are_divided_over_tpus_unless_told_otherwise(platform, count, sizes, expected):
    devices = [SimpleNamespace(platform=platform)] * count
    assert sharding._width(sizes, devices) == expected


def test_options_of_the_compiler_are_for_tpus_only():
    assert sharding.compiler_options(mesh_of(2)) == {}
    tpus = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))
    assert all(size > 100_000 for size in sharding.compiler_options(tpus).values())


def test_tensor_devices_share_their_examples():
    mesh = mesh_of(2, 2, 2)
    sharding.check_batch_size("batch_size", 12, mesh)
    with pytest.raises(UserError, match="which 4 devices"):
        sharding.check_batch_size("batch_size", 6, mesh)
    put = sharding.put_batch({"x": np.arange(8)}, mesh)["x"]
    np.testing.assert_array_equal(put, np.arange(8))
    assert {shard.data.shape for shard in put.addressable_shards} == {(2,)}
    assert sharding.batch_parts(mesh) == ((0, 1, 2, 3), 4)


def test_the_table_adds_up():
    mesh = mesh_of(2, 2, 2)
    tree = {
        "Dense_0": {"kernel": jax.ShapeDtypeStruct((256, 1024), jnp.float32)},
        "scale": jax.ShapeDtypeStruct((256,), jnp.float32),
    }
    rows = [line.split() for line in sharding.table(tree, mesh).splitlines()]
    assert rows[1] == [
        "(Dense_0|gate)/kernel",
        "fsdp,",
        "tensor",
        "1",
        "1.0",
        "MiB",
        "256.0",
        "KiB",
    ]
    assert rows[2] == ["everything", "else", "nothing", "1", "1.0", "KiB", "1.0", "KiB"]
    assert rows[3][-4:] == ["1.0", "MiB", "257.0", "KiB"]
    assert sharding.bytes_per_device(tree, mesh) == 257 * 1024


def test_weights_are_gathered_and_divided_again():
    mesh = mesh_of(1, 4, 2)
    params = {"Dense_0": {"kernel": np.float32(np.arange(64).reshape(8, 8))}}
    put = sharding.put_params(params, mesh)
    assert put["Dense_0"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    back = sharding.gather(put, mesh)
    np.testing.assert_array_equal(back["Dense_0"]["kernel"], params["Dense_0"]["kernel"])


def test_activations_stay_divided_by_examples_and_weights_are_gathered():
    """Else XLA would exchange activations, which are many times as large for a real batch."""
    config = configuration.get_config()
    config.model.update({"depth": 2, "width": 64, "mlp_dim": 128, "num_heads": 2})
    config.image_size, config.batch_size = (32, 32), 256
    configuration.set_duration(config, "total", epochs=90)
    configuration.set_duration(config.optimizer, "warmup", steps=10)
    config = registry.with_computation_chosen(config)
    mesh = mesh_of(1, 8, 1)
    learning = program.build_learning(config, mesh, 8, 1000)
    state = abstract(learning.abstract_state, learning.shardings)
    batch = {
        "image": jax.ShapeDtypeStruct((256, 32, 32, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((256,), jnp.int32),
    }
    batch = abstract(batch, sharding.split_batch(mesh))
    text = learning.train_step.lower(state, batch).compile().as_text()
    gathered = [
        math.prod(map(int, line.split("f32[")[1].split("]")[0].split(",")))
        for line in text.splitlines()
        if " all-gather(" in line and "f32[" in line.split(" all-gather(")[0]
    ]
    assert gathered
    assert max(gathered) <= 16 * 16 * 3 * 64  # the largest kernel; tokens would be 256 * 5 * 64
    assert " all-to-all(" not in text


def test_a_checkpoint_restores_on_another_mesh(tmp_path):
    goal = Classification(network(variant="B/16"))
    init = lambda: init_state(goal, optax.adam(0.1), 0, True)
    shapes = jax.eval_shape(init)
    states = {}
    for i, axes in enumerate([(1, 8, 1), (1, 1, 1), (2, 2, 2)]):
        mesh = mesh_of(*axes)
        where = sharding.shardings(shapes, mesh)
        with Checkpoints(tmp_path, 1) as checkpoints:
            if i == 0:
                state = jax.jit(init, out_shardings=where)()
            else:
                state = checkpoints.restore(abstract(shapes, where))
            checkpoints.save(i, state, {"config": {}, "class_names": [], "layout": 2})
        states[axes] = jax.device_get(state)
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0, state, where)
    for other in states.values():
        jax.tree.map(np.testing.assert_array_equal, other, states[1, 8, 1])
