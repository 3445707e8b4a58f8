"""Images per second and memory of training: `python -m benchmarks.train_step`.

A step is forward, softmax cross-entropy, backward and AdamW, on a batch that is on the device
already. Measures every contestant that is installed, in turns.
"""

from absl import flags

from benchmarks import options, peers
from benchmarks.measure import compare
from vit_jax.command_line import cli

CONTESTANTS = (
    peers.OURS,
    "vit_jax, memory kept",
    "vit_jax, unrolled",
    "vit_jax, unrolled, dots",
    "Flax layers",
    "timm",
    "timm, compiled",
    "Hugging Face",
)
BATCH_SIZES = {"cpu": [16], "gpu": [128], "tpu": [128]}


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    session = options.start("train_step")
    chosen = options.contestants(session, CONTESTANTS)
    models = "S/16" if session.backend == "cpu" else "B/16,L/16,H/14"
    rounds = flags.FLAGS.rounds
    for model, task in options.tasks(session, models, BATCH_SIZES, training=True):
        rows = compare(model, task, chosen, rounds, session.threads, session.one_at_a_time)
        session.add(rows)


if __name__ == "__main__":
    cli.run(main, lambda: options.define("train_step"))
