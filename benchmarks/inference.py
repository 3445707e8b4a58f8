"""Images per second of inference: `python -m benchmarks.inference`.

Measures every contestant that is installed, in turns, and saves times, ratios and shares of
the device's speed as JSON; `python -m benchmarks.report FILE.json` shows them.
"""

from absl import flags

from benchmarks import options, peers
from benchmarks.measure import compare
from vit_jax.command_line import cli

CONTESTANTS = (
    peers.OURS,
    "vit_jax, float32 kernels",
    "Flax layers",
    "timm",
    "timm, compiled",
    "Hugging Face",
    "ONNX Runtime",
    "OpenVINO",
)
BATCH_SIZES = {"cpu": [1, 16], "gpu": [1, 256], "tpu": [1, 256]}


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    session = options.start("inference")
    chosen = options.contestants(session, CONTESTANTS)
    rounds = flags.FLAGS.rounds
    for model, task in options.tasks(session, "S/16,B/16", BATCH_SIZES, training=False):
        rows = compare(model, task, chosen, rounds, session.threads, session.one_at_a_time)
        session.add(rows)


if __name__ == "__main__":
    cli.run(main, lambda: options.define("inference"))
