"""One of several processes that save or restore a checkpoint together, on a given mesh.

python -m tests.training.checkpoint_process WORKDIR ACTION MESH PORT COUNT INDEX [FAIL]

ACTION is `save` (steps 1 and 2) or `restore`, which prints the step that came back, or the
sentence. MESH is data,fsdp,tensor. In process FAIL, reading fails as on a disk with errors.
"""

import errno
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoints import orbax_io
from vit_jax.checkpoints.directory import Checkpoints, abstract
from vit_jax.distributed import sharding
from vit_jax.system.errors import UserError

CARD = {"config": {"ema_decay": 0.0}, "class_names": ["cat", "dog"]}


def values(step):
    """Arrays that the rules of `sharding` divide in different ways."""
    key = jax.random.key(step)
    return {
        "step": jnp.int32(step),
        "Dense_0": {"kernel": jax.random.normal(key, (64, 96)), "bias": jnp.ones(96) * step},
        "head": {"kernel": jax.random.normal(key, (64, 12))},
        "norm": {"scale": jnp.ones(64) * step},
    }


def main(workdir, action, axes, port, count, index, fail=""):
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    sizes = tuple(map(int, axes.split(",")))
    mesh = jax.make_mesh(sizes, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    shapes = jax.eval_shape(lambda: values(0))
    where = sharding.shardings(shapes, mesh)
    make = jax.jit(values, out_shardings=where, static_argnums=0)
    with Checkpoints(Path(workdir), 2) as checkpoints:
        if action == "save":
            for step in (1, 2):
                checkpoints.save(step, make(step), CARD)
            return
        if fail == index:
            orbax_io._read = raise_input_output_error
        try:
            found = checkpoints.restore(abstract(shapes, where))
        except UserError as error:
            print(f"error: {error}")
            return
    step = int(found["step"])
    same = jax.tree.leaves(jax.tree.map(same_here, found, make(step)))
    print(f"step {step} {'equal' if all(same) else 'different'}")


def same_here(x, y):
    pairs = zip(x.addressable_shards, y.addressable_shards, strict=True)
    return all(np.array_equal(a.data, b.data) for a, b in pairs)


def raise_input_output_error(*args):
    raise OSError(errno.EIO, "Input/output error")


if __name__ == "__main__":
    main(*sys.argv[1:])
