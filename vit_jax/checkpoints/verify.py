"""Looks for damage in all checkpoints of a work directory, without using or changing any."""

import time
from pathlib import Path

from vit_jax.checkpoints import orbax_io
from vit_jax.checkpoints.digests import Damaged
from vit_jax.distributed.sharding import readable
from vit_jax.system.errors import UserError


def verify_workdir(workdir: Path) -> None:
    """Reads every checkpoint, compares it with its digests and prints a line for each.

    Raises:
      UserError: some are damaged, one cannot be read now, or there are none.
    """
    found = checkpoints(workdir)
    if not found:
        raise UserError(f"{workdir} has no checkpoints: pass the --workdir of a training run")
    damaged = [str(path.relative_to(workdir)) for path in found if not _intact(workdir, path)]
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(found)} checkpoints in {workdir} are damaged "
            f"({', '.join(damaged)}): copy them again from where they are intact, or train "
            f"on, which goes on from the newest intact one"
        )


def checkpoints(workdir: Path) -> list[Path]:
    """All states and the best weights, in order."""
    folders = [workdir / "checkpoints", workdir / "best"]
    return [
        folder / str(step)
        for folder in folders
        if folder.is_dir()
        for step in reversed(orbax_io.steps(folder))
    ]


def _intact(workdir: Path, path: Path) -> bool:
    """Prints what is found about one checkpoint, and returns whether it is intact."""
    start = time.perf_counter()
    try:
        found = orbax_io.verify(path)
    except Damaged as damage:
        print(f"{path.relative_to(workdir)}  damaged: {damage}", flush=True)
        return False
    verdict = "intact" if found.verified else f"readable, but {orbax_io.UNVERIFIABLE}"
    print(
        f"{path.relative_to(workdir)}  {verdict}: {found.arrays} arrays, "
        f"{readable(found.bytes)}, {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    return True
