"""Peak memory of training against the batch size: `python -m benchmarks.memory`.

Each contestant makes a few updates in a separate process, while no other runs. On a CPU the
peak is that of the process's resident memory, on an accelerator the most that its library had
allocated. A contestant that fails at one size is not measured at a larger one, so that with
sizes that double the last row says what fits.
"""

from benchmarks import options, peers
from benchmarks.measure import Row, compare
from vit_jax.command_line import cli

CONTESTANTS = (
    peers.OURS,
    "vit_jax, remat full",
    "vit_jax, unrolled",
    "vit_jax, unrolled, dots",
    "Flax layers",
    "timm",
    "timm, compiled",
    "Hugging Face",
)
DOUBLING = [64, 128, 256, 512, 1024, 2048]
BATCH_SIZES = {"cpu": [4, 16], "gpu": DOUBLING, "tpu": DOUBLING}
UPDATES = 2  # after those that warm up


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    session = options.start("memory")
    chosen = options.contestants(session, CONTESTANTS)
    models = "S/16" if session.backend == "cpu" else "B/16,L/16,H/14"
    failed: set[tuple[str, str, str]] = set()
    for model, task in options.tasks(session, models, BATCH_SIZES, training=True):
        key = lambda name, model=model, task=task: (model, task.dtype, name)
        left = [found for found in chosen if key(found.name) not in failed]
        rows: list[Row] = compare(
            model, task, left, UPDATES, session.threads, one_at_a_time=True, sample=0.0
        )
        failed |= {key(row["contestant"]) for row in rows if "failed" in row}
        session.add(rows)


if __name__ == "__main__":
    cli.run(main, lambda: options.define("memory"))
