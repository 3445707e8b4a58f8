"""The sweep: what it compares, what it chooses, and going on after every kind of stop."""

import json
import os
import shutil
import signal

import pytest
from PIL import Image

from tests import commands
from tests.tiny_config import tiny
from vit_jax import config as configuration
from vit_jax.distributed import sharding
from vit_jax.system.errors import UserError
from vit_jax.training import grid, trainer
from vit_jax.training.logging import read_metrics
from vit_jax.training.reporting import Diverged


def swept(**fields):
    """Two learning rates, of which the second is far better."""
    config = tiny()
    configuration.set_duration(config, "total", steps=16)
    config.ema_decay = config.data.mixup = 0.0  # what compiles faster
    config.model.update({"depth": 1, "dropout": 0.0, "stochastic_depth": 0.0})
    config.data.update({"train_split": "train[:90%]", "eval_split": "train[90%:]"})
    config.sweep.update(
        {"lr": (0.00001, 0.01), "train_split": "train", "test_split": "test"} | fields
    )
    return config


def evaluations(workdir):
    records = read_metrics(workdir / "metrics.jsonl")
    return [record for record in records if "eval/accuracy" in record]


# --- With real runs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    return workdir, grid.sweep(swept(), workdir)


def test_a_sweep_trains_each_value_then_the_best_on_all_data(finished):
    workdir, record = finished
    assert json.loads((workdir / "sweep.json").read_text()) == json.loads(json.dumps(record))
    assert list(record["runs"]) == ["lr_1e-05", "lr_0.01"]
    for name, run in record["runs"].items():
        last = evaluations(workdir / name)[-1]
        assert last == {"step": 16, **run["metrics"]}
        assert last["eval/count"] == 144  # a tenth of the 1,437 to train on
    accuracy = {name: run["metrics"]["eval/accuracy"] for name, run in record["runs"].items()}
    assert accuracy["lr_0.01"] > accuracy["lr_1e-05"]
    assert record["chosen"] == "lr_0.01"
    [test] = evaluations(workdir / "final")  # once, at the end
    assert test == {"step": 16, **record["final"]["metrics"]}
    assert test["eval/count"] == 360
    final = json.loads((workdir / "final" / "config.json").read_text())
    assert (final["data"]["train_split"], final["data"]["eval_split"]) == ("train", "test")
    assert final["optimizer"]["lr"] == 0.01


def test_the_figure_is_a_picture(finished):
    with Image.open(finished[0] / "sweep.png") as picture:
        assert picture.size == (900, 600)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert (0, 114, 178) in colours  # the curve
    assert len(colours) > 10


def test_what_is_finished_is_not_trained_again(finished, monkeypatch):
    workdir, record = finished
    monkeypatch.setattr(trainer, "train", None)
    assert grid.sweep(swept(), workdir) == json.loads(json.dumps(record))


def test_stopped_in_the_second_run_it_goes_on_to_the_same_end(finished, tmp_path, monkeypatch):
    original, batches = sharding.put_batch, 0

    def put_and_interrupt(batch, mesh):
        nonlocal batches
        batches += "mask" not in batch
        if batches == 16 + 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, mesh)

    monkeypatch.setattr(sharding, "put_batch", put_and_interrupt)
    assert grid.sweep(swept(), tmp_path) is None
    monkeypatch.undo()
    assert list(json.loads((tmp_path / "sweep.json").read_text())["runs"]) == ["lr_1e-05"]
    assert read_metrics(tmp_path / "lr_0.01" / "metrics.jsonl")[-1]["step"] == 5
    record = grid.sweep(swept(), tmp_path)
    for part in ("runs", "chosen", "final"):
        assert record[part] == finished[1][part]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def door(how, tmp_path, workdir, *arguments):
    config = tmp_path / "config.py"
    config.write_text("from tests.test_sweep import swept as get_config\n")
    return how("sweep", f"--config={config}", f"--workdir={workdir}", *arguments)


def test_the_door_prints_the_table_and_the_test_result(finished, tmp_path):
    workdir, record = finished
    result = door(commands.run, tmp_path, workdir, "--config.sweep.lr=(0.00001, 0.01)")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "accuracy on train[90%:]:" in lines
    assert f"best of 2 runs: lr_0.01; all in {workdir}" in lines
    accuracy = record["final"]["metrics"]["eval/accuracy"]
    assert lines[-1] == (
        f"test accuracy {accuracy:.4f} of 360 examples (test), trained on train"
    )


def test_the_door_says_in_one_sentence_that_there_is_nothing_to_try(tmp_path):
    result = door(commands.call, tmp_path, tmp_path / "new", "--config.sweep.lr=()")
    assert result.returncode == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: config.sweep has no values to try: set e.g. --config.sweep")
    assert not (tmp_path / "new").exists()


def test_a_run_with_damaged_states_only_begins_anew_where_that_is_asked_for(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "sweep")
    path = workdir / "sweep.json"
    record = json.loads(path.read_text())
    del record["runs"]["lr_0.01"]  # as if it had not come to its end
    path.write_text(json.dumps(record))
    for card in workdir.glob("lr_0.01/checkpoints/*/card/metadata"):
        card.write_text("{")
    intact = (workdir / "lr_1e-05" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"lr_0\.01 is intact.*passing --begin_anew"):
        grid.sweep(swept(), workdir)
    again = grid.sweep(swept(), workdir, begin_anew=True)
    assert again["runs"] == finished[1]["runs"]
    assert (workdir / "lr_1e-05" / "metrics.jsonl").read_bytes() == intact


def test_the_door_has_the_remedies_of_training(finished, tmp_path):
    result = door(
        commands.call, tmp_path, finished[0], "--begin_anew"
    )  # where nothing is damaged
    assert result.returncode == 0, result.stderr


# --- With runs that are only played -------------------------------------------------------


@pytest.fixture
def play(monkeypatch):
    """Replaces training: accuracy and loss come from a table by learning rate."""
    results, trained = {}, []

    def train(config, workdir, overridden, stop):
        workdir.mkdir(parents=True, exist_ok=True)
        trained.append(workdir.name)
        accuracy, loss = results[config.optimizer.lr]
        if accuracy is None:
            raise Diverged("the loss is nan at step 3: lower it")
        return {"eval/accuracy": accuracy, "eval/count": 9, "eval/loss": loss}

    monkeypatch.setattr(trainer, "train", train)
    return results, trained


def test_a_value_that_diverges_is_on_record_and_the_others_go_on(play, tmp_path, capsys):
    results, trained = play
    results |= {0.3: (None, 0), 0.01: (0.5, 1.25)}
    record = grid.sweep(swept(lr=(0.3, 0.01), train_split=None), tmp_path)
    assert record["runs"]["lr_0.3"]["failed"] == "the loss is nan at step 3: lower it"
    assert record["chosen"] == "lr_0.01"
    assert trained == ["lr_0.3", "lr_0.01"]
    assert record["final"] is None  # as there is nothing to train it on
    output = capsys.readouterr().out
    assert "lr_0.3 failed: the loss is nan at step 3" in output
    table = output[output.index("run      accuracy") :].splitlines()
    assert table[1].split() == ["lr_0.3", "failed", "-"]
    assert table[2].split() == ["lr_0.01", "0.5000", "1.2500", "<-", "best"]
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size == (900, 600)


def test_of_equal_accuracies_the_lower_loss_is_chosen(play, tmp_path):
    results, trained = play
    results |= {0.1: (0.5, 0.7), 0.2: (0.9, 0.4), 0.3: (0.9, 0.3), 0.4: (0.9, 0.5)}
    record = grid.sweep(swept(lr=(0.1, 0.2, 0.3, 0.4)), tmp_path)
    assert record["chosen"] == "lr_0.3"
    assert trained == ["lr_0.1", "lr_0.2", "lr_0.3", "lr_0.4", "final"]


def test_values_may_be_added_and_taken_out(play, tmp_path):
    results, trained = play
    results |= {0.1: (0.5, 0.7), 0.2: (0.4, 0.4), 0.3: (0.45, 1.0)}
    grid.sweep(swept(lr=(0.1, 0.2)), tmp_path)
    record = grid.sweep(swept(lr=(0.1, 0.2, 0.3)), tmp_path)
    assert trained == ["lr_0.1", "lr_0.2", "final", "lr_0.3"]
    assert record["chosen"] == "lr_0.1"
    message = r"final was made with run 'lr_0\.1', not 'lr_0\.3': move it away"
    with pytest.raises(UserError, match=message):
        grid.sweep(swept(lr=(0.2, 0.3)), tmp_path)
    (tmp_path / "final").rename(tmp_path / "final.before")
    record = grid.sweep(swept(lr=(0.2, 0.3)), tmp_path)
    assert record["final"]["run"] == "lr_0.3"
    assert trained[-1] == "final"


def test_another_test_split_does_not_pass_for_the_one_that_was_used(play, tmp_path):
    play[0][0.1] = (0.5, 0.7)
    grid.sweep(swept(lr=(0.1,)), tmp_path)
    with pytest.raises(UserError, match=r"final was made with test_split 'test', not 'test\["):
        grid.sweep(swept(lr=(0.1,), test_split="test[:50%]"), tmp_path)


def test_other_data_to_choose_by_or_another_model_are_refused(play, tmp_path):
    play[0][0.1] = (0.5, 0.7)
    grid.sweep(swept(lr=(0.1,)), tmp_path)
    config = swept(lr=(0.1,))
    config.data.eval_split = "train[95%:]"
    with pytest.raises(UserError, match=r"compares accuracies on data\.eval_split='train\[90%"):
        grid.sweep(config, tmp_path)
    config = swept(lr=(0.1,))
    config.model.depth = 3
    with pytest.raises(UserError, match=r"was trained with model\.depth=1, not 3"):
        grid.sweep(config, tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json cannot be read"):
        grid.sweep(swept(lr=(0.1,)), tmp_path)


def test_when_all_diverge_there_is_nothing_to_choose(play, tmp_path):
    play[0].update({0.1: (None, 0), 0.2: (None, 0)})
    with pytest.raises(UserError, match=r"all of lr_0\.1, lr_0\.2 failed: add lower values"):
        grid.sweep(swept(lr=(0.1, 0.2)), tmp_path)
    play[0][0.01] = (0.3, 1.0)
    record = grid.sweep(swept(lr=(0.1, 0.2, 0.01)), tmp_path)
    assert record["chosen"] == "lr_0.01"
    assert play[1] == ["lr_0.1", "lr_0.2", "lr_0.01", "final"]  # no value twice


# --- The grid -----------------------------------------------------------------------------


def test_every_length_meets_every_rate():
    config = swept(lr=(0.1, 0.2, 0.1), steps=((50, 10), (250, 20)))
    found = grid.settings(config)
    assert [setting.name for setting in found] == [
        "steps_50-warmup_10-lr_0.1",
        "steps_50-warmup_10-lr_0.2",
        "steps_250-warmup_20-lr_0.1",
        "steps_250-warmup_20-lr_0.2",
    ]
    configuration.set_duration(config, "total", epochs=3)
    applied = found[-1].apply(config)
    assert (applied.total_steps, applied.total_epochs) == (250, None)
    assert (applied.optimizer.warmup_steps, applied.optimizer.lr) == (20, 0.2)
    assert (config.total_epochs, config.optimizer.lr) == (3, 1e-3)
    lengths_only = grid.settings(swept(lr=(), steps=((50, 10),)))
    assert lengths_only == [grid.Setting(1e-3, (50, 10))]


@pytest.mark.parametrize(
    ("fields", "overridden", "message"),
    [
        ({"lr": ()}, [], r"config\.sweep has no values to try"),
        ({"lr": (0.1, 0.0)}, [], r"config\.sweep\.lr has 0\.0: every value must be positive"),
        ({"lr": ("a",)}, [], r"config\.sweep\.lr has 'a'"),
        ({"steps": (500,)}, [], r"config\.sweep\.steps has 500: write pairs of total"),
        ({"steps": ((500, 1, 2),)}, [], r"config\.sweep\.steps has \(500, 1, 2\)"),
        ({"steps": ((5.5, 1),)}, [], r"config\.sweep\.steps has \(5\.5, 1\)"),
        ({}, ["optimizer.lr"], r"config\.optimizer\.lr is set, but config\.sweep\.lr has"),
        ({"steps": ((5, 1),)}, ["total_epochs"], r"config\.total_epochs is set, but"),
        (
            {"steps": ((5, 1),)},
            ["optimizer.warmup_steps"],
            r"set config\.sweep\.steps instead",
        ),
    ],
)
def test_a_grid_that_cannot_be_is_refused_in_a_sentence(fields, overridden, message):
    with pytest.raises(UserError, match=message):
        grid.settings(swept(**fields), overridden)


def test_the_test_data_are_found_before_anything_is_trained(play, tmp_path):
    for fields, message in [
        ({"test_split": None}, r"config\.sweep\.test_split is not set: name the split"),
        ({"test_split": "train[90%:]"}, r"are both 'train\[90%:\]': choose on a part of"),
        ({"test_split": "validation"}, None),  # digits has one set held out: the same
        ({"test_split": "tset"}, r"digits has no split 'tset'; it has train, test"),
    ]:
        if message:
            with pytest.raises(UserError, match=message):
                grid.sweep(swept(**fields), tmp_path)
        else:
            grid.check_splits(swept(**fields))
    assert play[1] == []
