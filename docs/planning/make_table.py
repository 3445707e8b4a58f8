"""Makes the table of largest batches of docs/planning.md: `python docs/planning/make_table.py`.

With libtpu. Compiles what has no JSON file beside this script yet (minutes each; remove a file
to have it made anew), and writes the table into the page. With `--table` it only writes.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "planning.md"
I1K = "--config=configs/vit_i1k.py:"

# Names of files differ by more than their case, which some file systems do not see.
NETWORKS = {
    "b16": "B/16",
    "l16": "L/16",
    "h14": "H/14",
    "giant14": "g/14",
    "gigantic14": "G/14",
}
SLICES = ("v5e:4x4", "v6e:4x4", "v4:4x4x4", "v5p:4x4x4", "v5e:16x16")
CASES = [
    (HERE / f"largest_{name}_{slice_.replace(':', '-')}.json", variant, slice_)
    for slice_ in SLICES
    for name, variant in NETWORKS.items()
]


def command(path: Path, variant: str, topology: str) -> list[str]:
    return [
        *(sys.executable, "-m", "vit_jax.plan", I1K + variant, f"--topology={topology}"),
        *("--config.model.unroll=1", "--search", "--policy=dots", f"--output={path}"),
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
    *("GB moved", "GiB sent a device", "ms a step", "MFU", "CPU s to compile"),
)


def largest(path: Path) -> dict:
    """Of the plans of a search that with the largest batch that fits."""
    size = lambda plan: plan["fits"] * plan["per_device_batch"]
    return max(json.loads(path.read_text())["dots"], key=size)


def write_table(plans: list[dict]) -> None:
    begin, end = "<!-- largest batches -->\n", "<!-- end of largest batches -->\n"
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|", *map(row, plans)]
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2])


def main() -> None:
    for case in CASES:
        if "--table" not in sys.argv and not case[0].exists():
            print(" ".join(command(*case)[1:]), flush=True)
            subprocess.run(command(*case), cwd=HERE.parent.parent, check=False)
    write_table([largest(path) for path, *_ in CASES if path.exists()])


if __name__ == "__main__":
    main()
