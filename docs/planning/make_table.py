"""Makes the table of docs/planning.md: `python docs/planning/make_table.py`, with libtpu.

Compiles what has no JSON file beside this script yet (minutes each; remove a file to have it
made anew), and writes the table into the page. With `--table` it only writes the table.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "planning.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
I1K = "--config=configs/vit_i1k.py:"

# Name of the file, configuration, slice, fsdp, examples a device.
CASES = (
    ("b16_v5e-4x4", "B/16", "v5e:4x4", 1, 64),
    ("b16_v5e-4x4_1024", "B/16", "v5e:4x4", 1, 1024),
    ("l16_v5e-4x4", "L/16", "v5e:4x4", 1, 32),
    ("h14_v5e-4x4", "H/14", "v5e:4x4", 16, 8),
    ("g14_v5e-4x4", "g/14", "v5e:4x4", 16, 8),
    ("G14_v5e-4x4", "G/14", "v5e:4x4", 16, 4),
    ("b16_v5e-16x16", "B/16", "v5e:16x16", 1, 64),
    ("l16_v5e-16x16", "L/16", "v5e:16x16", 1, 32),
    ("h14_v5e-16x16", "H/14", "v5e:16x16", 256, 16),
    ("g14_v5e-16x16", "g/14", "v5e:16x16", 128, 8),
    ("G14_v5e-16x16", "G/14", "v5e:16x16", 256, 16),
    ("G14_v5e-16x16_128", "G/14", "v5e:16x16", 128, 8),
    ("l16_v4-4x4x4", "L/16", "v4:4x4x4", 1, 64),
    ("l16_v6e-4x4", "L/16", "v6e:4x4", 1, 64),
    ("b16_v5p-4x4x4", "B/16", "v5p:4x4x4", 64, 32),
    ("G14_v5p-4x4x4", "G/14", "v5p:4x4x4", 64, 32),
)


def command(name: str, variant: str, topology: str, fsdp: int, batch: int) -> list[str]:
    return [
        *(sys.executable, "-m", "vit_jax.plan", I1K + variant, f"--topology={topology}"),
        *(f"--config.mesh.fsdp={fsdp}", f"--per_device_batch={batch}"),
        f"--output={HERE / name}.json",
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
    worked = plan["seconds"].get("compile (processor)")
    cells = (
        *(plan["variant"], plan["target"], mesh, plan["per_device_batch"], plan["batch_size"]),
        "yes" if plan["fits"] else "**no**",
        *(gib(plan["used"]), gib(plan["limit"])),
        f"{plan['model_flops'] / 1e12:,.0f}",
        f"{plan['counted_flops'] / plan['model_flops'] - 1:+.2%}",
        *(f"{again:.1%}", gib(sent), step, mfu),
        f"{plan['seconds']['compile']:.0f}",
        "" if worked is None else f"{worked:.0f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = (
    *("model", "slice", "data x fsdp x tensor", "batch a device", "batch", "fits"),
    *("GiB a device", "of GiB", "model TFLOP a step", "counted in the program", "recomputed"),
    *("GiB sent a device", "ms a step", "MFU", "s to compile", "processor s"),
)


def table() -> str:
    found = [HERE / f"{name}.json" for name, *_ in CASES]
    plans = [json.loads(path.read_text()) for path in found if path.exists()]
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|", *map(row, plans)]
    return "\n".join(lines) + "\n"


def main() -> None:
    for case in CASES:
        if "--table" not in sys.argv and not (HERE / f"{case[0]}.json").exists():
            print(" ".join(command(*case)[1:]), flush=True)
            subprocess.run(command(*case), cwd=HERE.parent.parent, check=False)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
