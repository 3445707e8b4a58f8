"""What the training step of a configuration needs: compiled, but not run."""

import dataclasses
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax.checkpoints.directory import abstract
from vit_jax.distributed import sharding
from vit_jax.models import registry
from vit_jax.models.flops import train_flops
from vit_jax.models.model import count_parameters
from vit_jax.planning import products, roofline
from vit_jax.planning.program import Collective, Mover, Program
from vit_jax.planning.roofline import Roofline
from vit_jax.planning.target import Target
from vit_jax.system.errors import UserError
from vit_jax.training.program import Learning, build_learning

MOVERS = 10  # how many of the largest movers of bytes a plan keeps

# --- What is planned ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      arguments: the state and the batch.
      outputs: the new state and metrics.
      aliases: of the outputs, what takes the place of arguments.
      temporaries: activations, gradients and gathered weights.
      code: the program itself.
    """

    arguments: int
    outputs: int
    aliases: int
    temporaries: int
    code: int

    @property
    def needed(self) -> int:
        """All that is there at once."""
        return self.arguments + self.outputs - self.aliases + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one training step needs.

    `model_flops` are counted from the shape of the network (models/flops.py), `counted_flops`
    in the traced program without recomputation and `executed_flops` with it, all for a step
    and all devices. `memory`, `traffic` (bytes to and from HBM in a step), `movers` (the
    largest parts of it) and `collectives` are those of one device, None and empty where the
    compiler refused with `refusal`.
    """

    variant: str
    image_size: tuple[int, int]
    target: str
    chip: str | None
    devices: int
    mesh: dict[str, int]
    batch_size: int
    per_device_batch: int
    remat: str
    scan: bool
    num_classes: int
    parameters: int
    model_flops: int
    counted_flops: int
    executed_flops: int
    limit: int | None
    memory: Memory | None
    traffic: int | None
    movers: tuple[Mover, ...]
    collectives: tuple[Collective, ...]
    estimate: Roofline | None
    notes: tuple[str, ...]
    refusal: str | None
    used: int | None  # bytes on a device; also known if the compiler refuses
    seconds: dict[str, float]

    @property
    def fits(self) -> bool:
        return self.refusal is None and (
            self.limit is None or self.used is None or self.used <= self.limit
        )

    def verdict(self) -> str:
        """One sentence."""
        what = f"{self.variant} with {self.per_device_batch} examples a device"
        if self.fits and self.limit and self.used:
            return f"fits: {what} needs {gib(self.used)} of {gib(self.limit)} on {self.target}"
        if self.fits:
            return f"compiles: {what} needs {gib(self.used or 0)} on {self.target}"
        reason = self.refusal or f"it needs {gib(self.used or 0)} of {gib(self.limit or 0)}"
        return (
            f"does not fit: {what} on {self.target}: {reason}; use a smaller "
            f"--per_device_batch, config.accumulation, config.model.remat=full or a larger "
            f"config.mesh.fsdp (--search finds what fits)"
        )


def gib(size: float) -> str:
    """Bytes, for people."""
    return f"{size / (1 << 30):.2f} GiB"


# --- Compiling ----------------------------------------------------------------------------


def make_plan(
    config: ConfigDict,
    target: Target,
    num_classes: int,
    examples: int,
    batch_size: int,
    build: registry.Builder = registry.build,
) -> Plan:
    """Traces and compiles the training step of `config` with `batch_size` examples.

    Args:
      config: with `model.scan` and `model.remat` decided. Its own batch size decides no more
        than the learning rates.
      target: what to compile for.
      num_classes: of the data.
      examples: in an epoch.
      batch_size: of all devices.
      build: makes the network; another formulation of it can be planned, too.

    Raises:
      UserError: a field does not fit the rest, or the batch the mesh.
    """
    mesh = sharding.make_mesh(config.mesh, target.devices)
    sharding.check_batch_size("the batch", batch_size, mesh, config.accumulation)
    learning = build_learning(config, mesh, num_classes, examples, build)
    clock = _Clock()
    traced = _trace(config, learning, mesh, batch_size)
    counted = executed = products.product_flops(traced.jaxpr.jaxpr)
    if config.model.remat != "none":
        plain = config.copy_and_resolve_references()
        plain.model.remat = "none"
        again = build_learning(plain, mesh, num_classes, examples, build)
        counted = products.product_flops(_trace(plain, again, mesh, batch_size).jaxpr.jaxpr)
    clock.note("trace")
    lowered = traced.lower()
    clock.note("lower")
    found = _compile(lowered)
    clock.note("compile")
    model_flops = batch_size * train_flops(learning.objective.model.config)
    estimate = None
    if target.chip and found.traffic is not None:
        estimate = roofline.estimate(
            target.chip,
            target.shape,
            model_flops=model_flops / mesh.size,
            executed_flops=executed / mesh.size,
            traffic=found.traffic,
            collectives=found.collectives,
        )
    return Plan(
        variant=config.model.variant,
        image_size=tuple(config.image_size),
        target=target.name,
        chip=target.chip.name if target.chip else None,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        batch_size=batch_size,
        per_device_batch=batch_size // sharding.shares(mesh),
        remat=config.model.remat,
        scan=config.model.scan,
        num_classes=num_classes,
        parameters=count_parameters(learning.abstract_state.params),
        model_flops=model_flops,
        counted_flops=counted,
        executed_flops=executed,
        limit=target.memory,
        memory=found.memory,
        traffic=found.traffic,
        movers=found.movers,
        collectives=found.collectives,
        estimate=estimate,
        notes=(*undivided(learning.abstract_state, mesh), *found.notes),
        refusal=found.refusal,
        used=found.used,
        seconds=clock.seconds,
    )


class _Compiled(NamedTuple):
    """What a compiler made of a step; the fields are those of `Plan`."""

    memory: Memory | None = None
    traffic: int | None = None
    movers: tuple[Mover, ...] = ()
    collectives: tuple[Collective, ...] = ()
    notes: tuple[str, ...] = ()
    refusal: str | None = None
    used: int | None = None


def _compile(lowered: Any) -> _Compiled:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal, used = refused(str(error))
        return _Compiled(refusal=refusal, used=used)
    memory = memory_of(compiled)
    try:
        program = Program(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:  # seen of libtpu 0.0.52
        reason = str(error).splitlines()[0][:100]
        note = f"XLA cannot print its program ({reason}): what is moved and sent is not known"
        return _Compiled(memory, notes=(note,), used=memory.needed)
    collectives, traffic = tuple(program.collectives()), program.traffic()
    movers = tuple(program.movers()[:MOVERS])
    loops = len(program.unknown_loops)
    notes = (f"{loops} loop(s) of unknown length count once",) if loops else ()
    return _Compiled(memory, traffic, movers, collectives, notes, used=memory.needed)


def undivided(state: Any, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """A sentence where much of the state stays whole, though the mesh should divide it."""
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    even = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / parts
    held = sharding.bytes_per_device(state, mesh)
    if held < 1.5 * even:
        return ()
    return (
        f"the state takes {gib(held)} on a device, where {gib(even)} would be its part: "
        f"config.mesh.fsdp={mesh.shape['fsdp']} or config.mesh.tensor={mesh.shape['tensor']} "
        f"does not divide the network's width or number of heads",
    )


def _trace(config: ConfigDict, learning: Learning, mesh: jax.sharding.Mesh, size: int) -> Any:
    """The training step for a batch as `data.pipeline.train_batches` yields it."""
    where = sharding.split_batch(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct(
            (size, *config.image_size, config.data.channels), jnp.uint8, sharding=where
        ),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=where),
    }
    state = abstract(learning.abstract_state, learning.shardings)
    return learning.train_step.trace(state, batch)


class _Clock:
    """Seconds of each part of the work, in order, and those that processors worked on it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last, self._worked = time.perf_counter(), time.process_time()

    def note(self, part: str) -> None:
        now, worked = time.perf_counter(), time.process_time()
        self.seconds[part] = round(now - self._last, 2)
        self.seconds[f"{part} (processor)"] = round(worked - self._worked, 2)
        self._last, self._worked = now, worked


def memory_of(compiled: Any) -> Memory:
    """The memory that the compiler reports for its program."""
    sizes = compiled.memory_analysis()
    return Memory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        aliases=sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )


def refused(message: str) -> tuple[str, int | None]:
    """Reads a compiler's refusal: a sentence, and the bytes that it would have used.

    Raises:
      UserError: it refuses for another reason than memory.
    """
    if not message.startswith("RESOURCE_EXHAUSTED"):
        raise UserError(f"the compiler refuses the step: {message.strip().splitlines()[0]}")
    amount = r"([\d.]+[KMGT]?)"
    forms = (
        rf"HLO temporaries \({amount}\) exceeds available HBM \({amount}\)",
        rf"Used {amount} of {amount} hbm",
    )
    for form in forms:
        if numbers := re.search(form, message):
            used, limit = map(_bytes, numbers.groups())
            said = f"the compiler needs {gib(used)} of the {gib(limit)} that it may use"
            return said, used
    return f"the compiler says {' '.join(message.split())[:300]}", None


def _bytes(text: str) -> int:
    """`15.75G` in bytes."""
    unit = text[-1] if text[-1] in "KMGT" else ""
    return round(float(text.removesuffix(unit)) * 1024 ** " KMGT".index(unit or " "))
