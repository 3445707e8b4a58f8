"""The trainer as a whole: resume, signals, evaluation, refusal of what cannot be right."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.campaign.bit_flips import forget_digests
from tests.commands import TINY, environment
from tests.interop import tiny_models
from tests.tiny_config import LONG, TOTAL, tiny
from vit_jax import config as configuration
from vit_jax.checkpoints.directory import Checkpoints, abstract, load_card
from vit_jax.checkpoints.trained import load_any
from vit_jax.data.on_device import prepare_for_eval
from vit_jax.data.sources import catalog
from vit_jax.data.sources.in_memory import ArraySource
from vit_jax.data.sources.source import fingerprint
from vit_jax.distributed import sharding
from vit_jax.distributed.signals import StopSignal
from vit_jax.interop import google, huggingface
from vit_jax.system.errors import UserError
from vit_jax.training import begin, loop, trainer
from vit_jax.training.logging import read_metrics
from vit_jax.training.reporting import Diverged
from vit_jax.training.run import build


def final_state(workdir):
    """Every array of the last checkpoint."""
    run = build(tiny())
    target = abstract(run.learning.abstract_state, run.learning.shardings)
    with Checkpoints(workdir, 2) as checkpoints:
        return jax.device_get(checkpoints.restore(target))


def metrics(workdir):
    """What was logged, without the one number that depends on the clock."""
    records = read_metrics(workdir / "metrics.jsonl")
    timed = ("images_per_second", "data_wait", "mfu")
    return [{k: v for k, v in r.items() if k not in timed} for r in records]


def assert_same_run(workdir, reference):
    assert metrics(workdir) == metrics(reference)
    found, expected = final_state(workdir), final_state(reference)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    best = [sorted(p.name for p in (d / "best").iterdir()) for d in (workdir, reference)]
    assert best[0] == best[1]


# --- In one process -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    workdir, result = tiny_run
    return shutil.copytree(workdir, tmp_path_factory.mktemp("finished") / "run"), result


def test_a_run_leaves_everything_it_promises(finished):
    workdir, result = finished
    records = metrics(workdir)
    assert [r["step"] for r in records if "train/loss" in r] == list(range(1, TOTAL + 1))
    evaluations = [r for r in records if "eval/accuracy" in r]
    assert [r["step"] for r in evaluations] == [8, 16, 24]
    assert {r["eval/count"] for r in evaluations} == {360}
    assert evaluations[-1] == {"step": TOTAL, **result}
    assert all(r["lr"] >= 0 and r["grad_norm"] > 0 for r in records if "lr" in r)
    checkpoints = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert checkpoints == [20, 24]
    assert len(list((workdir / "best").iterdir())) == 1
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "config.json").read_text())["model"]["variant"] == "mu/4"
    speeds = [r for r in read_metrics(workdir / "metrics.jsonl") if "images_per_second" in r]
    assert len(speeds) == TOTAL


def test_running_again_when_complete_changes_nothing(finished, capsys):
    workdir, result = finished
    before = metrics(workdir)
    assert trainer.train(tiny(), workdir) == result
    assert metrics(workdir) == before
    assert "already complete" in capsys.readouterr().out


def test_evaluation_counts_every_example_once_whatever_the_batch_size(finished):
    workdir, result = finished
    run = build(tiny(eval_batch_size=40))
    state = final_state(workdir)
    stop = StopSignal()
    other = loop.evaluate_state(run, state, stop)
    assert other["eval/count"] == 360
    assert other["eval/accuracy"] == result["eval/accuracy"]
    assert other["eval/loss"] == pytest.approx(result["eval/loss"], rel=1e-6)


@pytest.mark.parametrize("stop_at", [3, 8, 13])
def test_stopping_by_signal_and_resuming_is_bit_identical(
    finished, tmp_path, monkeypatch, capsys, stop_at
):
    """The signal comes within a step, or (at 8) in the middle of an evaluation."""
    original, steps = sharding.put_batch, 0

    def put_and_interrupt(batch, mesh):
        nonlocal steps
        is_training = "mask" not in batch
        steps += is_training
        if steps == stop_at and is_training == (stop_at != 8):
            os.kill(os.getpid(), random.choice([signal.SIGTERM, signal.SIGINT]))
        return original(batch, mesh)

    monkeypatch.setattr(sharding, "put_batch", put_and_interrupt)
    trainer.train(tiny(), tmp_path)
    monkeypatch.undo()
    told = [line for line in capsys.readouterr().out.splitlines() if "saving" in line]
    assert len(told) == 1
    assert ("before that is done, nothing is" in told[0]) == (stop_at == 3)
    assert int(final_state(tmp_path).step) == stop_at
    trainer.train(tiny(), tmp_path)
    assert_same_run(tmp_path, finished[0])


def test_an_evaluation_that_is_cut_short_again_and_again_is_made_in_the_end(
    finished, tmp_path, monkeypatch
):
    original = sharding.put_batch

    def put_and_interrupt(batch, mesh):
        if "mask" in batch:  # of an evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, mesh)

    monkeypatch.setattr(sharding, "put_batch", put_and_interrupt)
    for _ in range(3):
        assert trainer.train(tiny(), tmp_path) == {}
        assert int(final_state(tmp_path).step) == 8
    monkeypatch.undo()
    trainer.train(tiny(), tmp_path)
    assert_same_run(tmp_path, finished[0])


def test_a_damaged_last_checkpoint_costs_only_the_steps_since_the_one_before(
    finished, tmp_path, capsys
):
    short = tiny()
    trainer.train(short, tmp_path)
    for path in (tmp_path / "checkpoints" / str(TOTAL)).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    trainer.train(short, tmp_path)
    assert "falling back" in capsys.readouterr().err
    assert_same_run(tmp_path, finished[0])


def test_another_configuration_is_refused_and_nothing_is_touched(finished):
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    config = tiny()
    config.model.dropout = 0.3
    with pytest.raises(UserError, match=r"was trained with model\.dropout=0\.2, not 0\.3"):
        trainer.train(config, workdir)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def test_a_loss_that_is_not_finite_names_the_step_and_spares_the_checkpoint(tmp_path):
    config = tiny()
    config.optimizer.update({"lr": 1e30, "clip_norm": 0.0, "name": "sgd"})
    configuration.set_duration(config.optimizer, "warmup", steps=12)
    configuration.set_duration(config, "checkpoint_every", steps=1)
    with pytest.raises(
        Diverged, match=r"is (nan|inf) at step \d+: the last good checkpoint"
    ) as e:
        trainer.train(config, tmp_path)
    step = int(str(e.value).split("at step ")[1].split(":")[0])
    saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert saved[-1] == step - 1
    with pytest.raises(UserError, match=f"at step {step}"):  # the same again after a resume
        trainer.train(config, tmp_path)
    assert all(np.isfinite(r["train/loss"]) for r in metrics(tmp_path))


def test_no_steps_is_an_error():
    config = tiny()
    configuration.set_duration(config, "total", epochs=0)
    with pytest.raises(UserError, match="the length of training is 0 steps"):
        build(config)


def test_the_loop_neither_recompiles_nor_moves_data_by_accident(tmp_path):
    run = build(tiny())
    state = run.learning.init()
    batches = run.train_reading.train_batches(run.source)
    with batches:
        for _ in range(4):
            batch = sharding.put_batch(next(batches), run.mesh)
            with jax.transfer_guard("disallow"):
                state, _ = run.learning.train_step(state, batch)
    assert run.learning.train_step._cache_size() == 1


# --- The data are what they were ----------------------------------------------------------


def change_digits(monkeypatch, **rows):
    """From now on a split of the digits consists of `rows` of what it was."""
    kind = catalog._KINDS["digits"]

    def changed(argument, split, data_dir):
        whole = kind.open(argument, split, data_dir)
        chosen = np.arange(len(whole))[rows.get(split, slice(None))]
        images, labels = whole.images[chosen], whole.labels[chosen]
        return ArraySource(images, labels, whole.class_names, whole.name)

    monkeypatch.setitem(catalog._KINDS, "digits", kind._replace(open=changed))


def files_of(workdir):
    return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def test_a_card_tells_the_data_of_the_run_and_so_does_the_first_page(finished, capsys):
    workdir, _ = finished
    trainer.train(tiny(), workdir)
    page = capsys.readouterr().out
    data = load_card(workdir)["data"]
    assert data == load_card(workdir, "best")["data"]
    for split, name, n in [("train", "train", 1437), ("eval", "test", 360)]:
        assert data[split] == {
            "source": "digits",
            "split": name,
            "examples": n,
            "fingerprint": fingerprint(catalog.load("digits", name)),
        }
        assert f"({data[split]['fingerprint']})" in page


@pytest.mark.parametrize(
    ("rows", "now"),
    [
        (slice(1, None), "there are 1,436 in 'train' now: the batches"),
        (
            np.append(np.arange(1, 1437), 0),
            "there are 1,437 in 'train' now, with other names, labels or order: the batches",
        ),
    ],
    ids=["removed", "reordered"],
)
def test_other_examples_to_train_on_are_refused_and_nothing_is_touched(
    finished, monkeypatch, rows, now
):
    workdir, _ = finished
    before = files_of(workdir)
    change_digits(monkeypatch, train=rows)
    with pytest.raises(UserError) as caught:
        trainer.train(tiny(), workdir)
    assert str(caught.value) == (
        f"{workdir} was trained on 1,437 examples in 'train' of digits, and {now} would not "
        f"be those of the run. Restore the data, or choose another --workdir"
    )
    assert files_of(workdir) == before


def test_other_examples_to_evaluate_are_one_note(finished, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    change_digits(monkeypatch, test=slice(7, None))
    assert trainer.train(tiny(), workdir) == finished[1]  # of an evaluation made before
    assert capsys.readouterr().err.splitlines() == [
        f"note: {workdir} was evaluated on 360 examples in 'test' of digits, and there are 353 "
        "in 'test' now: scores from here on do not compare with those before, yet best/ is "
        "chosen among all"
    ]


def test_a_run_of_before_there_were_fingerprints_goes_on(finished, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    for path in workdir.glob("checkpoints/*/card/metadata"):
        forget_digests(path.parent.parent)  # which came later
        card = json.loads(path.read_text())
        del card["data"]
        path.write_text(json.dumps(card))
    change_digits(monkeypatch, train=slice(1, None))
    assert trainer.train(tiny(), workdir) == finished[1]


# --- The model from the weights -----------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """A Hugging Face folder: exact GELU, another epsilon, pixels by mean and deviation."""
    cfg, params = tiny_models.model(gelu="erf", layer_norm_eps=1e-12)
    params = jax.tree.map(lambda x: 0.1 * x, params)
    huggingface.write(tmp_path / "weights", cfg, params, value_range="imagenet")
    return tmp_path / "weights"


def finetune(weights, **model):
    """Four steps from `weights`, which decide the model."""
    config = tiny(init_from=str(weights), image_size=(16, 16), ema_decay=0.0)
    configuration.set_duration(config, "total", steps=4)
    config.data.source, config.data.train_transform = (
        "synthetic:16x16x3,classes=3,examples=64",
        "",
    )
    config.model.variant, config.model.depth = None, None
    config.model.update(model)
    return config


def test_the_weights_decide_the_model_and_its_pixels(weights, tmp_path, capsys):
    config = finetune(weights)
    result = trainer.train(config, tmp_path / "run")
    assert result["eval/count"] == 64
    assert config.model.variant is None  # the caller's configuration stays as it is
    output = capsys.readouterr()
    assert "begins with" in output.out
    assert "was trained with" not in output.err
    stored = configuration.from_dict(json.loads((tmp_path / "run/config.json").read_text()))
    for name in ("depth", "width", "mlp_dim", "num_heads"):
        assert stored.model[name] == tiny_models.TINY[name]
    assert stored.model.variant == "mu/8"
    assert (stored.model.gelu, stored.model.layer_norm_eps) == ("erf", 1e-12)
    assert (stored.data.value_range, stored.data.channels) == ("imagenet", 3)
    assert (stored.model.dropout, stored.model.stochastic_depth) == (0.2, 0.2)
    run = build(stored)
    assert run.learning.objective.model.config.gelu == "erf"
    assert run.learning.objective.model.config.grid == (2, 2)
    prepared = prepare_for_eval(stored)(
        {"image": np.full((1, 1, 1, 3), 255, np.uint8)}, jax.random.key(0)
    )
    np.testing.assert_allclose(prepared["image"][0, 0, 0, 0], (1 - 0.485) / 0.229, rtol=1e-6)


def test_a_run_goes_on_without_the_weights_that_it_began_with(weights, tmp_path):
    config = finetune(weights)
    result = trainer.train(config, tmp_path / "run")
    again = config.copy_and_resolve_references()
    configuration.set_duration(again, "eval_every", steps=4)
    shutil.rmtree(weights)
    assert trainer.train(again, tmp_path / "run") == result
    with pytest.raises(UserError, match="there is no file or folder"):
        trainer.train(config, tmp_path / "other")
    with pytest.raises(UserError, match=r"was trained with model\.gelu='erf', not 'tanh'"):
        trainer.train(finetune(weights, gelu="tanh"), tmp_path / "run", ["model.gelu"])


def test_what_the_command_line_sets_wins_and_is_said(weights, tmp_path):
    config = finetune(weights, gelu="tanh", depth=3)
    resolved, before = begin.resolve(config, tmp_path / "run", ["model.gelu"])
    assert (resolved.model.gelu, resolved.model.depth) == ("tanh", 2)
    assert before.config.model.gelu == "erf"
    [note] = begin.mismatches(resolved, before.config)
    assert "was trained with model.gelu='erf' (here 'tanh'): set config to the same" in note
    with pytest.raises(UserError, match=r"the weights do not fit the model: .*encoderblock_2"):
        trainer.train(config, tmp_path / "deeper", ["model.depth"])


def test_a_variant_with_other_numerics_than_the_weights_is_one_note(weights, tmp_path, capsys):
    shape = {
        name: tiny_models.TINY[name] for name in ("depth", "width", "mlp_dim", "num_heads")
    }
    config = finetune(weights, variant="mu/8", **shape)
    config.data.channels = 3
    resolved, before = begin.resolve(config, tmp_path, [])
    assert resolved is config
    assert before is None
    run = build(config)
    before = load_any(config.init_from, "last", None)
    begin.take_over(run.learning.init(), run, before)
    [note] = [line for line in capsys.readouterr().err.splitlines() if "trained with" in line]
    assert note == (
        f"note: {weights} was trained with model.gelu='erf' (here 'tanh'), "
        f"model.layer_norm_eps=1e-12 (here 1e-06), data.value_range='imagenet' (here "
        f"'inception'): set config to the same, unless the difference is meant"
    )


def test_a_tanh_layer_stays_only_when_it_is_asked_for(tmp_path):
    google.write(tmp_path / "w.npz", *tiny_models.model(representation_size=24))
    config = finetune(tmp_path / "w.npz")
    resolved, _ = begin.resolve(config, tmp_path, [])
    assert resolved.model.representation_size is None
    config.model.representation_size = 24
    resolved, before = begin.resolve(config, tmp_path, [])
    run = build(resolved)
    state = begin.take_over(run.learning.init(), run, before)
    np.testing.assert_array_equal(
        state.params["model"]["pre_logits"]["kernel"], before.params["pre_logits"]["kernel"]
    )


def test_no_variant_and_no_weights_is_an_error(tmp_path):
    config = tiny()
    config.model.variant = None
    message = r"config\.model\.variant and config\.init_from are both unset"
    with pytest.raises(UserError, match=message):
        trainer.train(config, tmp_path)


# --- In processes of their own, killed for real -------------------------------------------


def command(workdir, *extra):
    return [
        sys.executable,
        "-m",
        "vit_jax.train",
        f"--config={TINY}",
        f"--workdir={workdir}",
        *extra,
    ]


def start(workdir):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(workdir), env=environment(optimized=False), stdout=pipe, stderr=pipe
    )


def last_step(workdir):
    records = read_metrics(workdir / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def wait_for_step(workdir, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if last_step(workdir) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(
        command(workdir), env=environment(optimized=False), check=True, capture_output=True
    )
    return workdir


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, id="SIGKILL"),
    ],
)
def test_killed_at_three_random_steps_the_end_is_bit_identical(undisturbed, tmp_path, kill):
    steps = sorted(random.sample(range(6, LONG - 5), 3))
    for step in steps:
        done = last_step(tmp_path)
        process = start(tmp_path)
        wait_for_step(tmp_path, max(step, done + 1), process)
        process.send_signal(kill)
        output, errors = process.communicate(timeout=60)
        if kill == signal.SIGTERM:
            assert process.returncode == 0, errors
            assert b"stopped by a signal" in output
        assert b"Traceback" not in errors, errors
    subprocess.run(
        command(tmp_path), env=environment(optimized=False), check=True, capture_output=True
    )
    assert_same_run(tmp_path, undisturbed)
