"""Makes the tables of docs/planning.md: `python docs/planning/make_table.py`, with libtpu.

Compiles what has no JSON file beside this script yet (minutes each; remove a file to have it
made anew), and writes the tables into the page. With `--table` it only writes the tables.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "planning.md"
I1K = "--config=configs/vit_i1k.py:"

# Name of the file, configuration, slice, fsdp (None: what the configuration does by itself),
# examples a device.
CASES = (
    ("b16_v5e-4x4", "B/16", "v5e:4x4", None, 64),
    ("b16_v5e-4x4_copies", "B/16", "v5e:4x4", 1, 64),
    ("l16_v5e-4x4", "L/16", "v5e:4x4", None, 32),
    ("l16_v5e-4x4_copies", "L/16", "v5e:4x4", 1, 32),
    ("l16_v6e-4x4", "L/16", "v6e:4x4", None, 64),
    ("h14_v5e-4x4", "H/14", "v5e:4x4", None, 8),
    ("giant14_v5e-4x4", "g/14", "v5e:4x4", None, 8),
    ("gigantic14_v5e-4x4", "G/14", "v5e:4x4", None, 4),
    ("b16_v5e-16x16", "B/16", "v5e:16x16", None, 64),
    ("l16_v5e-16x16", "L/16", "v5e:16x16", None, 32),
    ("h14_v5e-16x16", "H/14", "v5e:16x16", 256, 16),
    ("giant14_v5e-16x16", "g/14", "v5e:16x16", 128, 8),
    ("gigantic14_v5e-16x16", "G/14", "v5e:16x16", 256, 16),
    ("gigantic14_v5e-16x16_128", "G/14", "v5e:16x16", 128, 8),
    ("l16_v4-4x4x4", "L/16", "v4:4x4x4", None, 64),
    ("b16_v5p-4x4x4", "B/16", "v5p:4x4x4", 64, 32),
    ("gigantic14_v5p-4x4x4", "G/14", "v5p:4x4x4", 64, 32),
)

# Of these the largest batch is searched: the same, without the examples. Names differ by more
# than their case, which some file systems do not see.
NETWORKS = (("b16", "B/16"), ("l16", "L/16"), ("h14", "H/14"))
NETWORKS += (("giant14", "g/14"), ("gigantic14", "G/14"))
LARGEST = tuple(
    (f"largest_{name}_{slice_.replace(':', '-')}", variant, slice_, None)
    for slice_ in ("v5e:4x4", "v6e:4x4", "v4:4x4x4", "v5p:4x4x4", "v5e:16x16")
    for name, variant in NETWORKS
)


def command(
    name: str, variant: str, topology: str, fsdp: int | None, batch: int | None = None
) -> list[str]:
    size = [f"--per_device_batch={batch}"] if batch else ["--search", "--policy=dots"]
    mesh = [f"--config.mesh.fsdp={fsdp}"] if fsdp else []
    return [
        *(sys.executable, "-m", "vit_jax.plan", I1K + variant, f"--topology={topology}"),
        *("--config.model.unroll=1", *mesh, *size, f"--output={HERE / name}.json"),
    ]


def row(plan: dict) -> str:
    gib = lambda size: "" if size is None else f"{size / 2**30:.2f}"
    mesh = " x ".join(str(size) for size in plan["mesh"].values())
    percent = lambda share: f"{100 * share:.0f}%"
    estimate = plan["estimate"]
    mfu = " to ".join(map(percent, estimate["mfu"])) if estimate else ""
    step = (
        f"{1e3 * estimate['shortest']:.0f} to {1e3 * estimate['longest']:.0f}"
        if estimate
        else ""
    )
    again = plan["executed_flops"] / plan["counted_flops"] - 1
    sent = sum(c["sent"] for c in plan["collectives"]) if plan["memory"] else None
    cells = (
        *(plan["variant"], plan["target"], mesh, plan["per_device_batch"], plan["batch_size"]),
        "yes" if plan["fits"] else "**no**",
        *(gib(plan["used"]), gib(plan["limit"])),
        f"{plan['model_flops'] / 1e12:,.0f}",
        f"{plan['counted_flops'] / plan['model_flops'] - 1:+.2%}",
        f"{again:.1%}",
        "" if plan["traffic"] is None else f"{plan['traffic'] / 1e9:.1f}",
        *(gib(sent), step, mfu, f"{plan['seconds']['compile (processor)']:.0f}"),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = (
    *("model", "slice", "data x fsdp x tensor", "batch a device", "batch", "fits"),
    *("GiB a device", "of GiB", "model TFLOP a step", "counted in the program", "recomputed"),
    *("GB moved", "GiB sent a device", "ms a step", "MFU", "processor s to compile"),
)


def found(cases: Iterable[tuple]) -> list[dict]:
    """The plan of each case that has a file; of a search, the one with the largest batch."""
    paths = [HERE / f"{name}.json" for name, *_ in cases]
    read = [json.loads(path.read_text()) for path in paths if path.exists()]
    size = lambda plan: plan["fits"] * plan["per_device_batch"]
    return [max(plan["dots"], key=size) if "dots" in plan else plan for plan in read]


def write_table(name: str, plans: list[dict]) -> None:
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|", *map(row, plans)]
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2])


def main() -> None:
    for case in (*LARGEST, *CASES):
        if "--table" not in sys.argv and not (HERE / f"{case[0]}.json").exists():
            print(" ".join(command(*case)[1:]), flush=True)
            subprocess.run(command(*case), cwd=HERE.parent.parent, check=False)
    write_table("table", found(CASES))
    write_table("largest batches", found(LARGEST))


if __name__ == "__main__":
    main()
