"""Collectives and memory traffic of a compiled program, parsed from its text.

XLA prints a program as computations, lists of instructions that name each other:

  %body (p: (s32[], f32[6,128])) -> ... {
    %all-gather.1 = f32[6,512]{1,0:T(8,128)S(1)} all-gather(%x), replica_groups=[1,4]<=[4], ...
  }
  ENTRY %main ... { ... while(%tuple), condition=%cond, body=%body ... }

XLA's own cost analysis counts the body of a loop once; here every iteration counts. In a
layout, `T(8,128)` is the tile that the last axes are padded to, and `S(1)` a memory that is
not the device's main one (of a TPU: VMEM, the memory on the chip).
"""

import functools
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}  # others end in a number


class Array(NamedTuple):
    """Type and layout of one array."""

    dtype: str
    shape: tuple[int, ...]
    layout: str  # axes from minor to major, then tiles and memory

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _bits(self.dtype) // 8

    @property
    def padded_bytes(self) -> int:
        """Its size in memory, its last axes padded to whole tiles."""
        order, _, rest = self.layout.partition(":")
        shape, tile = list(self.shape), re.match(r"T\(([\d,]+)\)", rest)
        if shape and tile:
            axes = [int(axis) for axis in order.split(",")]
            for axis, edge in zip(axes, reversed(tile[1].split(",")), strict=False):
                shape[axis] = -(-shape[axis] // int(edge)) * int(edge)
        return math.prod(shape) * _bits(self.dtype) // 8

    @property
    def in_main_memory(self) -> bool:
        return not re.search(r"S\([1-9]", self.layout)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)  # f8e4m3fn too
    return int(digits[1]) if digits else 0


def arrays(text: str) -> list[Array]:
    """The arrays of a type, of which a tuple has several."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?", text)
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
        for dtype, shape, layout in found
    ]


class Instruction(NamedTuple):
    """One line: `name = type opcode(arguments), attributes`."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, name: str) -> str:
        """The computation that an attribute names, or an empty string."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind among as many devices, in one run of the program.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute ...
      devices: how many exchange with each other.
      count: how often.
      bytes: of what each device gives, over all of them.
      sent: bytes that each device sends, if they go around a ring.
      largest: the result of the largest of them.
    """

    kind: str
    devices: int
    count: int
    bytes: int
    sent: float
    largest: str


class Mover(NamedTuple):
    """Instructions of one operation of one part of the network, of all layers together.

    Attributes:
      phase: forward, recomputed, backward, or update (all that is outside of the network).
      part: names of modules, layers without their number.
      operation: of JAX; of what XLA adds by itself, its opcode.
      bytes: that they read from and write to the main memory in a run of the program.
      runs: how often one of them runs, over all of them.
      largest: the largest array that one of them makes.
    """

    phase: str
    part: str
    operation: str
    bytes: int
    runs: int
    largest: str


# Names in the path of an operation that are no modules.
_NO_MODULE = re.compile(
    r"while|body|cond|closed_call|checkpoint|rematted_computation|shard_map|.*\W.*"
)


def origin(instruction: Instruction) -> tuple[str, str, str]:
    """Phase, part of the network and operation that an instruction was made for."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    if not found:
        return "", "moved by XLA", instruction.opcode
    path = found[1]
    phase = "backward" if "transpose(" in path else "forward" if "jvp(" in path else "update"
    phase = "recomputed" if "rematted_computation" in path else phase
    *modules, operation = path.split("/")
    named = (
        re.sub(r"_\d+$", "", name) if name.startswith("encoderblock_") else name
        for name in modules
        if not _NO_MODULE.fullmatch(name)
    )
    return phase, "/".join(named), operation


KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


def sent(kind: str, size: int, devices: int) -> float:
    """Bytes that each of `devices` sends in a ring, of an operand of `size` bytes."""
    others = devices - 1
    shares = {"all-gather": others, "all-reduce": 2 * others / devices}
    if kind in shares:
        return shares[kind] * size
    return size * others / devices if kind in ("reduce-scatter", "all-to-all") else size


# Instructions that move nothing themselves.
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
        *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
    )
)


class Program:
    """The text of a compiled program, parsed.

    Attributes:
      unknown_loops: names of loops whose length is not in the text; they count once.
    """

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._roots: dict[str, str] = {}
        self._entry = ""
        self.unknown_loops: set[str] = set()
        self._parse(text)

    # --- Reading --------------------------------------------------------------------------

    def _parse(self, text: str) -> None:
        where = ""
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                where = header[2]
                self._computations[where] = {}
                self._entry = where if header[1] else self._entry
            elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.+)", line):
                instruction = _instruction(found[2], found[3])
                self._computations[where][instruction.name] = instruction
                if found[1]:
                    self._roots[where] = instruction.name

    @functools.cached_property
    def _users(self) -> dict[tuple[str, str], list[Instruction]]:
        users = defaultdict(list)
        for where, instructions in self._computations.items():
            for instruction in instructions.values():
                for operand in dict.fromkeys(instruction.operands):
                    users[where, operand].append(instruction)
        return users

    def _arrays(self, where: str, name: str) -> list[Array]:
        instruction = self._computations[where].get(name)
        return arrays(instruction.type) if instruction else []

    # --- How often ------------------------------------------------------------------------

    def runs(self, into_fusions: bool) -> Counter[str]:
        """How often each computation runs; those inside of fusions only on request."""
        counts: Counter[str] = Counter()

        def visit(where: str, times: int) -> None:
            counts[where] += times
            for instruction in self._computations[where].values():
                for callee, each in self._callees(where, instruction, into_fusions):
                    visit(callee, times * each)

        visit(self._entry, 1)
        return counts

    def _callees(
        self, where: str, instruction: Instruction, into_fusions: bool
    ) -> list[tuple[str, int]]:
        opcode, attribute = instruction.opcode, instruction.attribute
        if opcode == "while":
            times = self.trips(where, instruction)
            return [(attribute("body"), times), (attribute("condition"), times)]
        if opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
            names += [attribute("true_computation"), attribute("false_computation")]
            return [(name, 1) for name in names if name]
        if opcode == "call":
            return [(attribute("to_apply"), 1)]
        if opcode == "async-start" or (opcode == "fusion" and into_fusions):
            return [(attribute("calls"), 1)]
        return []

    def trips(self, where: str, loop: Instruction) -> int:
        """How often the body of a loop runs, 1 where that cannot be seen.

        XLA writes it beside the loop on some devices. On others the counter is compared with
        a constant, and begins with another; JAX's loops count up in steps of 1.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = loop.attribute("condition")
        test = self._computations[condition][self._roots[condition]]
        ends = [self._constant(condition, name) for name in test.operands]
        counters = [self._computations[condition].get(name) for name in test.operands]
        indices = [
            re.search(r"index=(\d+)", counter.attributes)
            for counter in counters
            if counter is not None and counter.opcode == "get-tuple-element"
        ]
        known_ends = [end for end in ends if end is not None]
        if len(known_ends) == 1 and len(indices) == 1 and indices[0]:
            initial = self._computations[where][loop.operands[0]]
            start = self._constant(where, initial.operands[int(indices[0][1])])
            if start is not None and "direction=LT" in test.attributes:
                return max(0, known_ends[0] - start)
        self.unknown_loops.add(loop.name)
        return 1

    def _constant(self, where: str, name: str) -> int | None:
        """The value of an integer that is a constant, or a copy of one."""
        instruction = self._computations[where].get(name)
        while instruction and instruction.opcode in ("copy", "bitcast"):
            instruction = self._computations[where].get(instruction.operands[0])
        if instruction and instruction.opcode == "constant":
            return int(instruction.arguments) if instruction.arguments.isdigit() else None
        return None

    # --- Collectives ----------------------------------------------------------------------

    def collectives(self) -> list[Collective]:
        """Every kind of collective, those that send most first."""
        found: dict[tuple[str, int], list[tuple[int, int, float, Array]]] = defaultdict(list)
        for where, times in self.runs(into_fusions=True).items():
            for instruction in self._computations[where].values():
                kind = instruction.opcode.removesuffix("-start")
                if kind not in KINDS or self._continues(where, instruction):
                    continue
                if kind == "all-reduce" and "all-reduce-scatter" in where:
                    kind = "reduce-scatter"  # of which a TPU keeps the scatter in the fusion
                given = [a for name in instruction.operands for a in self._arrays(where, name)]
                size, devices = sum(a.bytes for a in given), _group(instruction.attributes)
                result = max(arrays(instruction.type), key=lambda a: a.bytes)
                found[kind, devices].append(
                    (times, size * times, sent(kind, size, devices) * times, result)
                )
        collectives = [
            Collective(
                kind,
                devices,
                sum(times for times, *_ in rows),
                sum(size for _, size, *_ in rows),
                sum(moved for *_, moved, _ in rows),
                str(max((row[-1] for row in rows), key=lambda array: array.bytes)),
            )
            for (kind, devices), rows in found.items()
        ]
        return sorted(collectives, key=lambda c: -c.sent)

    @functools.cached_property
    def _started(self) -> set[str]:
        """Channels of collectives that a TPU starts in one fusion and ends in others."""
        return {
            _channel(instruction.attributes)
            for (where, name), users in self._users.items()
            if (instruction := self._computations[where].get(name))
            and any('"AsyncCollectiveStart"' in user.attributes for user in users)
        }

    def _continues(self, where: str, instruction: Instruction) -> bool:
        """Whether it is a later part of a collective that is counted where it starts."""
        if _channel(instruction.attributes) not in self._started:
            return False
        users = self._users[where, instruction.name]
        return not any('"AsyncCollectiveStart"' in user.attributes for user in users)

    # --- Traffic to the main memory -------------------------------------------------------

    def traffic(self) -> int:
        """Bytes that one run reads from and writes to the main memory, padding included.

        Every instruction reads its operands and writes its results once. Of an array that is
        only sliced, the slice is read; of one that is updated in place, the update is written.
        """
        return sum(
            times * self._traffic(where, instruction)
            for where, times in self.runs(into_fusions=False).items()
            for instruction in self._computations[where].values()
        )

    def movers(self) -> list["Mover"]:
        """The parts of `traffic`, by part of the network, the largest first."""
        found: dict[tuple[str, str, str], list[tuple[int, int, str]]] = defaultdict(list)
        for where, times in self.runs(into_fusions=False).items():
            for instruction in self._computations[where].values():
                if size := times * self._traffic(where, instruction):
                    shapes = sorted(arrays(instruction.type), key=lambda a: -a.bytes)
                    largest = str(shapes[0]) if shapes else ""
                    found[origin(instruction)].append((size, times, largest))
        movers = [
            Mover(*place, sum(s for s, *_ in rows), sum(n for _, n, _ in rows), max(rows)[-1])
            for place, rows in found.items()
        ]
        return sorted(movers, key=lambda mover: -mover.bytes)

    def _traffic(self, where: str, instruction: Instruction) -> int:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-start") or "AllocateBuffer" in str(instruction):
            return 0
        results = arrays(instruction.type)
        if opcode.endswith("-done"):  # the end has the moved array, the start its source
            start = self._computations[where].get(next(iter(instruction.operands), ""))
            source = start and next(iter(start.operands), "")
            sources = self._arrays(where, source) if source else []
            ends = [any(a.in_main_memory for a in side) for side in (sources, results)]
            return sum(ends) * sum(a.padded_bytes for a in results)
        callee = instruction.attribute("calls") if opcode == "fusion" else ""
        read = sum(
            self._read(where, instruction, callee, i, name)
            for i, name in enumerate(instruction.operands)
        )
        return read + sum(
            min(array.padded_bytes, size)
            for array, size in zip(results, self._written(where, instruction), strict=False)
            if array.in_main_memory
        )

    def _read(
        self, where: str, instruction: Instruction, callee: str, i: int, name: str
    ) -> int:
        operand = self._arrays(where, name)
        whole = sum(a.padded_bytes for a in operand if a.in_main_memory)
        if not whole:
            return 0
        if callee:
            return self._touched(callee, self._parameter(callee, i), whole)
        return self._touched_by(where, instruction, name, whole)

    def _parameter(self, where: str, i: int) -> str:
        return next(
            instruction.name
            for instruction in self._computations[where].values()
            if instruction.opcode == "parameter" and instruction.arguments == str(i)
        )

    def _touched(self, where: str, name: str, whole: int) -> int:
        """Bytes that a fusion reads of its parameter `name`, which has `whole`."""
        users = self._users[where, name]
        return min(whole, sum(self._touched_by(where, user, name, whole) for user in users))

    def _is_view(self, where: str) -> bool:
        """Whether a fusion only gives its one operand another shape, and moves nothing."""
        name, instructions = self._roots[where], self._computations[where]
        while instructions[name].opcode == "bitcast":
            name = instructions[name].operands[0]
        return instructions[name].opcode == "parameter"

    def _touched_by(self, where: str, user: Instruction, name: str, whole: int) -> int:
        first = user.operands[0] == name
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            return sum(a.padded_bytes for a in arrays(user.type))
        if user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and first):
            return 0
        if user.opcode == "bitcast":
            return self._touched(where, user.name, whole)
        if user.opcode == "fusion":
            callee = user.attribute("calls")
            if self._is_view(callee):
                return self._touched(where, user.name, whole)
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            parts = [self._touched(callee, self._parameter(callee, i), whole) for i in places]
            return sum(parts)
        return whole

    def _written(self, where: str, instruction: Instruction) -> list[int]:
        """Bytes written of each result: of an update in place, those of the update."""
        if instruction.opcode == "dynamic-update-slice":
            return [sum(a.padded_bytes for a in self._arrays(where, instruction.operands[1]))]
        if instruction.opcode == "bitcast":
            source = self._computations[where][instruction.operands[0]]
            if source.opcode in ("bitcast", "dynamic-update-slice", "fusion"):
                return self._written(where, source)
        if instruction.opcode == "fusion":
            callee = instruction.attribute("calls")
            return self._written(callee, self._computations[callee][self._roots[callee]])
        if instruction.opcode == "tuple":
            parts = [self._computations[where][name] for name in instruction.operands]
            return [size for part in parts for size in self._written(where, part)]
        return [a.padded_bytes for a in arrays(instruction.type)]


def _instruction(name: str, text: str) -> Instruction:
    """Splits what stands after `name =`."""
    end = _close(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opened = rest.index("(")
    closed = _close(rest, opened)
    return Instruction(name, kind, rest[:opened], rest[opened + 1 : closed - 1], rest[closed:])


def _close(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _channel(attributes: str) -> str:
    match = re.search(r"\bchannel_id=(\d+)", attributes)
    return match[1] if match else ""


def _group(attributes: str) -> int:
    """How many devices exchange with each other."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # An axis in part: 'axis':(devices before it)its size.
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    if match := re.search(r"source_target_pairs=\{([^=]*)\}\}", attributes):
        return 2
    return 1
