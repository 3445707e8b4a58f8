"""The loss of accuracy by bfloat16: `python -m benchmarks.precision`.

Three ways to compute with bfloat16 beside float32: as a CPU keeps it, as GPUs and TPUs keep it
(the CPU is treated as a TPU, so that the accelerator's code runs here), and as Flax's own
layers do, as in other projects. Two comparisons:

- the gradient of every parameter of a ViT with weights away from their initial values, against
  the same network of Flax's layers in float64;
- 200 steps of training with three seeds: the loss of each step and the final accuracy.

  --data=digits,fashion   scikit-learn's digits; Fashion-MNIST from the files of the Debian
                          package dataset-fashion-mnist (or of its authors) in --fashion_dir
"""

import contextlib
import gzip
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import conditions
from benchmarks.jax_contestants import flax_layers, for_flax
from benchmarks.measure import save
from vit_jax import config as configuration
from vit_jax.command_line import cli
from vit_jax.models import devices, vit
from vit_jax.models.vit_config import ViTConfig
from vit_jax.objectives.classification import Classification
from vit_jax.system.errors import UserError
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.step import init_state, make_train_step

# Of the gradients: a network on Fashion-MNIST's images. Of the curves: smaller ones, since a
# CPU runs the bfloat16 products of GPUs and TPUs slowly.
GRADIENTS = {
    "image_size": (28, 28), "patch_size": 4, "channels": 1, "num_classes": 10,
    "depth": 6, "width": 96, "mlp_dim": 384, "num_heads": 3,
}  # fmt: skip
CURVES = GRADIENTS | {"depth": 4, "width": 64, "mlp_dim": 256, "num_heads": 2}
IMAGES: dict[str, dict[str, Any]] = {
    "digits": CURVES | {"image_size": (8, 8), "patch_size": 2},
    "fashion": CURVES | {"patch_size": 7},
}
STEPS, BATCH, SEEDS = 200, 64, (0, 1, 2)

# Formulation: the type of products, and the platform whose rules hold.
WAYS = {
    "float32": ("float32", "cpu"),
    "bfloat16 as a CPU keeps it": ("bfloat16", "cpu"),
    "bfloat16 as GPU and TPU keep it": ("bfloat16", "tpu"),
}
PEERS = "bfloat16, Flax layers"


@contextlib.contextmanager
def taken_for(platform: str) -> Iterator[None]:
    """The network is traced for `platform`, and computed on this machine."""
    with mock.patch.object(devices, "platform", return_value=platform):
        yield


def network(shape: dict[str, Any], dtype: str) -> ViTConfig:
    return ViTConfig(**shape, dtype=dtype, gelu="erf")


# --- Gradients ----------------------------------------------------------------------------


def gradients(model: Any, params: Any, batch: Any) -> Any:
    images, labels = batch

    def loss(params: Any) -> jax.Array:
        logits = model.apply(params, images)[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    return jax.jit(jax.grad(loss))(params)


def gradient_errors() -> dict[str, dict[str, float]]:
    """For each formulation, the error of every parameter's gradient: ||a - b|| / ||b||.

    Of arrays of the same name in several layers, the largest. The bias of keys is left out: its
    gradient is zero but for rounding.
    """
    cfg = network(GRADIENTS, "float32")
    rng = np.random.default_rng(0)
    params = vit.build(cfg).init(jax.random.key(0))
    noise = lambda x: np.asarray(x) + 0.05 * rng.standard_normal(x.shape).astype(np.float32)
    params = jax.tree.map(noise, params)
    images = rng.standard_normal((32, *cfg.image_size, 1)).astype(np.float32)
    batch = images, rng.integers(0, 10, 32)
    theirs = for_flax(params, cfg.depth)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), theirs)
        model = flax_layers(network(GRADIENTS, "float32"), jnp.float64)
        exact = gradients(model, wide, (np.float64(images), batch[1]))
        exact = jax.tree.map(np.asarray, exact)
    found = {PEERS: gradients(flax_layers(network(GRADIENTS, "bfloat16")), theirs, batch)}
    for way, (dtype, platform) in WAYS.items():
        with taken_for(platform):
            ours = gradients(vit.build(network(GRADIENTS, dtype)), params, batch)
        found[way] = for_flax(ours, cfg.depth)
    return {way: errors(grads, exact) for way, grads in found.items()}


def errors(found: Any, exact: Any) -> dict[str, float]:
    largest: dict[str, float] = {}
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(exact), strict=True)
    for (path, a), b in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = "/".join("FlaxBlock" if "FlaxBlock" in n else n for n in name.split("/"))
        if not name.endswith("key/bias"):
            error = np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b)
            largest[name] = max(largest.get(name, 0.0), float(error))
    return largest


# --- Curves -------------------------------------------------------------------------------


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file of bytes, as MNIST's authors defined it.

    Raises:
      UserError: it does not exist.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist: install the Debian package dataset-fashion-mnist, or name "
            f"the folder of its four files with --fashion_dir, or leave fashion out of --data"
        )
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load(data: str, folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(images, labels) to train on and to evaluate: (N, H, W, 1) float32 from -1 to 1."""
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.float32(digits.images[..., None] / 8.0 - 1.0)
        parts = slice(0, 1437), slice(1437, None)
        return [(images[part], digits.target[part]) for part in parts]
    splits = []
    for name in ("train", "t10k"):
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
        splits.append((np.float32(images[..., None] / 127.5 - 1.0), np.int32(labels)))
    return splits


def train(data: str, splits: Any, way: str, seed: int) -> dict[str, Any]:
    """200 steps of Adam: the loss of each, and the accuracy on all held-out images."""
    dtype, platform = WAYS[way]
    (images, labels), (held, answers) = splits
    options = configuration.get_config().optimizer
    options.update({"weight_decay": 0.1, "clip_norm": 1.0})
    schedule = make_schedule("cosine", 1e-3, STEPS, warmup=20)
    optimizer = make_optimizer(options, schedule)
    with taken_for(platform):
        objective = Classification(vit.build(network(IMAGES[data], dtype)))
        step = jax.jit(
            make_train_step(objective, optimizer, schedule, lambda b, key: b, seed=seed)
        )
        state = jax.jit(lambda: init_state(objective, optimizer, seed, False))()
        order = np.random.default_rng(seed)
        losses = []
        for _ in range(STEPS):
            rows = order.integers(0, len(images), BATCH)
            state, metrics = step(state, {"image": images[rows], "label": labels[rows]})
            losses.append(metrics["train/loss"])
        predict = jax.jit(lambda p, x: objective.model.apply(p, x)[0].argmax(-1))
        weights = state.params["model"]
        parts = [predict(weights, held[i : i + 500]) for i in range(0, len(held), 500)]
    accuracy = float((np.concatenate(parts) == answers).mean())
    return {"data": data, "way": way, "seed": seed, "accuracy": accuracy,
            "losses": [round(float(loss), 4) for loss in losses]}  # fmt: skip


# --- Tables -------------------------------------------------------------------------------


def error_table(found: dict[str, dict[str, float]]) -> str:
    ways = [PEERS, *WAYS]
    lines = ["| gradient of | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for name in found[PEERS]:
        cells = [f"{100 * found[way][name]:.3g}%" for way in ways]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve_table(runs: list[dict[str, Any]]) -> str:
    lines = ["| data | formulation | accuracy, three seeds | mean | mean loss of the last 20 |"]
    lines.append("|---|---|---|---|---|")
    group = lambda run: (run["data"], run["way"])
    for (data, way), rows in itertools.groupby(sorted(runs, key=group), group):
        each = list(rows)
        accuracies = [run["accuracy"] for run in each]
        last = np.mean([run["losses"][-20:] for run in each])
        shown = " ".join(f"{100 * a:.2f}" for a in accuracies)
        lines.append(
            f"| {data} | {way} | {shown} | {100 * np.mean(accuracies):.2f} | {last:.3f} |"
        )
    return "\n".join(lines)


def define_flags() -> None:
    flags.DEFINE_list("data", list(IMAGES), "Data sets to train on.")
    flags.DEFINE_string("fashion_dir", "/usr/share/datasets/fashion-mnist", "Its four files.")
    flags.DEFINE_string("output", "docs/precision.json", "The JSON file to write.")


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    given = flags.FLAGS
    if unknown := [data for data in given.data if data not in IMAGES]:
        raise UserError(f"--data has {unknown[0]!r}: use some of {', '.join(IMAGES)}")
    splits = {data: load(data, Path(given.fashion_dir)) for data in given.data}
    found = conditions.look(conditions.limit_threads(None))
    record: dict[str, Any] = {"benchmark": "precision", "conditions": found, "results": []}
    record["gradient_errors"] = gradient_errors()
    print(error_table(record["gradient_errors"]), flush=True)
    for data, way, seed in itertools.product(given.data, WAYS, SEEDS):
        record["results"].append(train(data, splits[data], way, seed))
        save(Path(given.output), record)
    print(curve_table(record["results"]))


if __name__ == "__main__":
    cli.run(main, define_flags)
