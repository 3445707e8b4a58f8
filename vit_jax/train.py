"""Trains a model: `python -m vit_jax.train --config=FILE[:ARGUMENT] --workdir=DIR`.

Any field can be set on the command line, `--config.optimizer.lr=3e-4`; all are listed, with
their meaning, in vit_jax/config.py. Running the same command again continues from the newest
checkpoint: the result is bit-identical to an uninterrupted run. SIGTERM, SIGHUP and Ctrl-C
save and exit with code 0. On several machines, start the same command on each (docs/running).

The work directory holds `metrics.jsonl` (one JSON object a line), `tensorboard/`,
`checkpoints/` (the last states), `best/` (the weights of the best evaluation) and
`config.json`.
"""

from absl import flags

from vit_jax.command_line import cli, process_flags, training_flags, weight_flags
from vit_jax.distributed import processes
from vit_jax.system import cache
from vit_jax.training.trainer import train


def define_flags() -> None:
    training_flags.define_flags()
    flags.adopt_module_key_flags(training_flags)  # so that --help shows them
    process_flags.define_flags()
    flags.adopt_module_key_flags(process_flags)


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    arguments = training_flags.from_flags()
    with process_flags.together():
        cache.keep_compiled_programs()
        result = train(
            *arguments, said=weight_flags.from_flags(), begin_anew=flags.FLAGS.begin_anew
        )
    measured = [x for x in ("accuracy", "mAP", "loss") if f"eval/{x}" in result]
    if measured:
        value = f"{result[f'eval/{measured[0]}']:.4f}"
        processes.say(f"{measured[0]} {value} of {result['eval/count']} examples")


if __name__ == "__main__":
    cli.run(main, define_flags)
