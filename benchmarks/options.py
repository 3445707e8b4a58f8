"""The flags that all benchmarks share."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks import conditions, measure, peers, report
from benchmarks.task import CLASSES, Task
from vit_jax import config as configuration
from vit_jax.models import registry
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

DTYPES = ("float32", "bfloat16")


def define(benchmark: str, rounds: int = 7) -> None:
    output = Path("benchmarks/results") / f"{benchmark}.json"
    flags.DEFINE_list("models", None, "Networks, e.g. S/16,Ti/4@32 (at 32 pixels).")
    flags.DEFINE_list("batch_sizes", None, "Images in a batch; default: what fits the device.")
    flags.DEFINE_list("dtypes", list(DTYPES), "float32, bfloat16.")
    flags.DEFINE_multi_string("contestants", None, "Only this one; may be repeated.")
    flags.DEFINE_integer("rounds", rounds, "How often each takes its turn.", lower_bound=1)
    flags.DEFINE_integer("threads", None, "CPU cores to use; default: all.", lower_bound=1)
    flags.DEFINE_bool(
        "one_at_a_time", None, "No turns: each starts when the last has ended; default: on TPU."
    )
    flags.DEFINE_string("output", str(output), "The JSON file to write.")


class Session(NamedTuple):
    """The settings of a whole run, from the flags and the machine."""

    threads: int
    backend: str
    one_at_a_time: bool
    record: dict[str, Any]

    def add(self, rows: list[measure.Row]) -> None:
        """Keeps rows, at once on disk since a long run may be stopped, and prints them."""
        self.record["results"] += rows
        measure.save(Path(flags.FLAGS.output), self.record)
        print(report.table(rows, report.SHOWN[self.record["benchmark"]]), flush=True)


def start(benchmark: str) -> Session:
    """Raises UserError where no device can be used."""
    threads = conditions.limit_threads(flags.FLAGS.threads)
    found = conditions.look(threads)
    given = flags.FLAGS.one_at_a_time
    one_at_a_time = found["backend"] == "tpu" if given is None else given
    if (load := found["load_before"][0]) > threads / 2:
        print(
            f"warning: the machine is busy (load {load:.1f}), which hurts torch's threads more "
            f"than those of XLA: measure again when it is quiet",
            file=sys.stderr,
        )
    record = {"benchmark": benchmark, "conditions": found, "results": []}
    return Session(threads, found["backend"], one_at_a_time, record)


def contestants(session: Session, default: tuple[str, ...]) -> list[peers.Contestant]:
    """Raises UserError for an unknown name."""
    return peers.choose(flags.FLAGS.contestants, default, session.backend)


def tasks(
    session: Session, models: str, batch_sizes: dict[str, list[int]], training: bool
) -> Iterator[tuple[str, Task]]:
    """The name of a network and what to do with it, from the flags or else the defaults.

    Raises:
      UserError: a network, batch size or precision that does not exist; before the first.
    """
    given = flags.FLAGS
    names = given.models or models.split(",")
    shapes = {name: shape(name) for name in names}
    sizes = _batch_sizes(given.batch_sizes) or batch_sizes[session.backend]
    for dtype in given.dtypes:
        if dtype not in DTYPES:
            raise UserError(f"--dtypes has {dtype!r}: use some of {', '.join(DTYPES)}")
    return (
        (name, make_task(shapes[name], size, dtype, training, session.backend))
        for name in names
        for size in sizes
        for dtype in given.dtypes
    )


def _batch_sizes(given: list[str] | None) -> list[int]:
    for text in given or ():
        if not text.isdecimal() or int(text) == 0:
            raise UserError(f"--batch_sizes has {text!r}: write positive numbers, e.g. 1,16")
    return [int(text) for text in given or ()]


def shape(name: str) -> ViTConfig:
    """The network that e.g. `S/16` (at 224 pixels) or `Ti/4@32` stands for.

    Raises:
      UserError: there is no such Vision Transformer.
    """
    variant, _, size = name.partition("@")
    if size and not size.isdecimal():
        raise UserError(f"--models has {name!r}: write a variant and pixels, e.g. Ti/4@32")
    config = configuration.get_config()
    config.model.update({"variant": variant, "gelu": "erf"})
    if registry.decode(variant)[0] is not ViTConfig or "+" in variant:
        raise UserError(
            f"--models has {name!r}, which the peers do not have in this form: use a plain "
            f"Vision Transformer such as S/16"
        )
    pixels = int(size or 224)
    cfg = registry.configure(config.model, (pixels, pixels), 3, CLASSES)
    assert isinstance(cfg, ViTConfig)
    return cfg


def make_task(
    cfg: ViTConfig, batch_size: int, dtype: str, training: bool, backend: str
) -> Task:
    return Task(
        cfg.image_size, cfg.patch_size, cfg.depth, cfg.width, cfg.mlp_dim, cfg.num_heads,
        batch_size, dtype, training, backend,
    )  # fmt: skip
