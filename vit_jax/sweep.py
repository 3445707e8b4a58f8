"""Fine-tunes as the papers report it: choose on held-out data, train on all, test once.

  python -m vit_jax.sweep --config=configs/finetune.py:b16,pets --workdir=DIR

Trains once for every value in `config.sweep` (learning rates, and perhaps lengths) on
`config.data.train_split`, and compares the accuracies at the end on `config.data.eval_split`,
which should be a part of the training data. With the best it trains on all of
`config.sweep.train_split`, and evaluates that once on `config.sweep.test_split`; where no
`sweep.train_split` is set, this final run is left out.

  --config.sweep.lr='(0.001, 0.003, 0.01)'           values of optimizer.lr
  --config.sweep.steps='((500, 100), (2500, 200))'   pairs of total and warm-up steps

The work directory then holds `sweep.json` (every run, the one chosen, the test result),
`sweep.png` (accuracy against learning rate), and a work directory for each run, the last of
them `final`, which every other command can open. Running the same command again continues: what
is finished is not trained again, and values may be added. SIGTERM, SIGHUP and Ctrl-C save and
exit with code 0. A run whose loss is no longer a number counts as failed, and the others
continue.
"""

from absl import flags

from vit_jax.command_line import cli, training_flags, weight_flags
from vit_jax.training.grid import score, score_name, sweep


def define_flags() -> None:
    training_flags.define_flags()
    flags.adopt_module_key_flags(training_flags)  # so that --help shows them


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    config, workdir, overridden = training_flags.from_flags()
    begin_anew = flags.FLAGS.begin_anew
    record = sweep(config, workdir, overridden, weight_flags.from_flags(), begin_anew)
    if record is None:
        print(f"the sweep is stopped: run the same command to continue it in {workdir}")
        return
    print(f"\nbest of {len(record['runs'])} runs: {record['chosen']}; all in {workdir}")
    final = record["final"]
    if config.sweep.train_split:
        metrics = final["metrics"]
        print(
            f"test {score_name(metrics)} {score(metrics):.4f} of {metrics['eval/count']} "
            f"examples ({final['test_split']}), trained on {final['train_split']}"
        )
    else:
        print("no final run: config.sweep.train_split is not set")


if __name__ == "__main__":
    cli.run(main, define_flags)
