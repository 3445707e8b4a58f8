"""The experiments of the paper: each is built as it stands, the digits versions train."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import config as configuration
from vit_jax.data import reading
from vit_jax.models import registry
from vit_jax.objectives.registry import build_objective
from vit_jax.system.errors import UserError
from vit_jax.training import durations, grid, optimizer, trainer

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "configs/paper"
FILES = sorted(path.stem for path in PAPER.glob("*.py") if path.stem != "recipes")


def get(name, argument):
    return importlib.import_module(f"configs.paper.{name}").get_config(argument)


def counts(config, classes=1000):
    """Number of parameters, without computing any."""
    params = jax.eval_shape(registry.build_model(config, classes).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# --- As they stand ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    {
        "table8": ["none", "1d,layers", "2d", "2d,shared", "relative"],
        "figure3": ["B/32", "L/16,weight_decay=0.3,dropout=0.1,label_smoothing=0.1"],
        "figure4": ["B/32,1%", "R50x1,50%", "R50+B/32,100%"],
        "figure5": ["H/14", "R152x2", "R50+L/16,epochs=60"],
        "figure8": ["base", "depth=64", "width=512", "mlp=8192", "patch=8"],
        "figure9": ["cls_mlp", "cls_linear", "gap_linear,lr=8e-4"],
        "masked_patches": ["mean_colour", "small_patch", "pixels"],
    }.items(),
)
@pytest.mark.parametrize("data", ["i21k", "i1k"])
def test_each_full_size_experiment_is_one_that_can_be_built(name, arguments, data):
    for argument in arguments:
        config = get(name, f"{argument},{data}")
        objective = build_objective(config, 1000)
        optimizer.build_schedule(config, 1_281_167)
        durations.make_plan(config, 1_281_167)
        reading.train_reading(config)
        assert config.batch_size == 4096
        assert objective.model.config.image_size == (224, 224)


def test_the_default_argument_is_the_documented_one_at_full_size():
    for name in FILES:
        module = importlib.import_module(f"configs.paper.{name}")
        config = module.get_config()
        data = "imagenet2012" if name == "figure3" else "imagenet21k"
        assert config.data.source == f"tfds:{data}", name


def test_parameters_of_the_position_embeddings():
    """B/16 has 12 layers and heads of width 64, 196 patches and a class token, width 768."""
    none = counts(get("table8", "none"))
    more = {
        "1d,stem": 197 * 768,
        "1d,shared": 197 * 768,
        "1d,layers": 12 * 197 * 768,
        "2d,stem": 2 * 14 * 384,
        "2d,layers": 12 * 2 * 14 * 384,
        "relative": 12 * 12 * (2 * 197 - 1) * 64,
    }
    for argument, extra in more.items():
        assert counts(get("table8", argument)) == none + extra, argument


def test_the_heads_of_figure_9():
    """Without the tanh layer 768^2 + 768 fewer, without a class token two rows more."""
    mlp, linear, gap = (
        counts(get("figure9", head)) for head in ("cls_mlp", "cls_linear", "gap_linear")
    )
    assert mlp - linear == 768 * 768 + 768
    assert linear - gap == 2 * 768
    rates = [get("figure9", head).optimizer.lr for head in ("cls_mlp", "gap_linear")]
    assert rates == [8e-4, 3e-4]
    assert get("figure9", "gap_linear,lr=8e-4").optimizer.lr == 8e-4


def test_each_dimension_of_figure_8_changes_alone():
    """D.2's base: L=8, D=1024, M=2048, P=32 at 224 pixels."""

    def body(layers=8, width=1024, mlp=2048, patch=32):
        tokens = (224 // patch) ** 2 + 1
        block = 4 * width**2 + 4 * width + 2 * width * mlp + mlp + width + 4 * width
        stem = 3 * patch**2 * width + width + width + tokens * width
        head = width**2 + width + 1000 * width + 1000
        return stem + layers * block + 2 * width + head

    assert counts(get("figure8", "base")) == body()
    assert counts(get("figure8", "depth=64")) == body(layers=64)
    assert counts(get("figure8", "mlp=8192")) == body(mlp=8192)
    assert counts(get("figure8", "patch=16")) == body(patch=16)
    assert counts(get("figure8", "width=256")) == body(width=256)
    assert get("figure8", "width=256").model.num_heads == 4


def test_figure_4_takes_a_part_and_trains_as_long_as_on_all():
    whole, part = get("figure4", "B/32,100%"), get("figure4", "B/32,25%")
    assert whole.data.train_split == "full[51200:]"
    assert part.data.train_split == "full[51200:25%]"
    lengths = [durations.make_plan(whole, 14_000_000), durations.make_plan(part, 3_500_000)]
    assert lengths[0] == lengths[1]
    assert get("figure4", "B/32,25%,i1k").data.train_split == "train[:25%]"
    assert part.model.dropout == 0.0


def test_figure_3_sets_what_it_names_and_nothing_else():
    config = get("figure3", "L/16,dropout=0.2")
    assert (config.model.dropout, config.optimizer.weight_decay) == (0.2, 0.0)
    assert config.objective.label_smoothing == 0.0
    config = get("figure3", "L/16,weight_decay=0.3,label_smoothing=0.1,i21k")
    assert (config.model.dropout, config.optimizer.weight_decay) == (0.0, 0.3)
    assert config.objective.label_smoothing == 0.1
    assert config.model.variant == "L/16"


def test_masked_patches_follow_appendix_b():
    config = get("masked_patches", "mean_colour")
    assert (config.optimizer.lr, config.optimizer.schedule) == (2e-4, "cosine")
    assert (config.batch_size, config.objective.mask_ratio) == (4096, 0.5)
    assert config.optimizer.warmup_steps == 10_000
    assert build_objective(config, 1000).outputs == 512


# --- Arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("table8", "3d", "no position embedding '3d': use one of none, 1d, 2d, relative"),
        ("table8", "1d,top", "no place 'top': use one of stem, layers, shared"),
        ("table8", "none,layers", "leave out layers"),
        ("table8", "1d,,digits", "is not understood: write e.g. 1d,stem"),
        ("figure3", "B/16,lr=1", "no setting 'lr': use one of weight_decay"),
        ("figure3", "B/16,dropout=much", "'dropout=much' needs a number"),
        ("figure4", "B/32", "names no part of the data: write VARIANT,PERCENT%"),
        ("figure4", "B/32,0%", "with 1% to 100%"),
        ("figure5", "X/16", "there is no size 'X'"),
        ("figure5", "H/14,digits", "no variant on digits 'H/14': use one of B/32, L/32"),
        ("figure8", "depth=1.5", "no whole number of at least 1: write depth=16"),
        ("figure8", "heads=4", "no setting 'heads': use one of depth, width"),
        ("figure9", "gap", "no head 'gap': use one of cls_mlp"),
        ("figure9", "cls_mlp,lr=-1", "needs a number that is not negative"),
        ("masked_patches", "colour", "no target or phase 'colour'"),
        ("masked_patches", "finetune", "elsewhere fine-tune by configs/finetune.py"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_in_a_sentence(name, argument, message):
    with pytest.raises(UserError, match=re.escape(message)):
        get(name, argument)


def test_the_door_takes_them_from_any_directory(tmp_path):
    command = [sys.executable, "-m", "vit_jax.train", "--workdir=run"]
    command += [f"--config={PAPER / 'table8.py'}:3d"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stderr == (
        "error: the experiment has no position embedding '3d': use one of none, 1d, 2d, "
        "relative\n"
    )


# --- On digits ----------------------------------------------------------------------------


def shrunken(name, argument):
    """Two steps of a digits version, with one narrow layer."""
    config = get(name, f"{argument},digits")
    configuration.set_duration(config, "total", steps=2)
    configuration.set_duration(config.optimizer, "warmup", steps=1)
    config.batch_size = 8
    config.model.update({"depth": 1, "width": 16, "mlp_dim": 16, "num_heads": 2})
    return config


def test_the_digits_version_of_a_hybrid_trains(tmp_path):
    result = trainer.train(shrunken("figure5", "R50+B/32"), tmp_path)
    assert np.isfinite(result["eval/loss"])
    assert result["eval/count"] == 360


def test_masked_patches_are_learned_and_begun_with(tmp_path, capsys):
    before = trainer.train(shrunken("masked_patches", "small_patch"), tmp_path / "before")
    assert np.isfinite(before["eval/loss"])
    config = shrunken("masked_patches", "finetune")
    config.init_from = str(tmp_path / "before")
    after = trainer.train(config, tmp_path / "after")
    assert after["eval/count"] == 360
    assert "144 to train on" in capsys.readouterr().out


# --- What is told of them -----------------------------------------------------------------


@pytest.fixture(scope="module")
def runner():
    path = ROOT / "docs/paper/run_digits.py"
    spec = importlib.util.spec_from_file_location("run_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "docs/paper/digits.json").read_text())


@pytest.fixture(scope="module")
def readme():
    return (PAPER / "README.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_each_opens_with_command_cost_and_expected_number(name):
    docstring = (PAPER / f"{name}.py").read_text().split('"""')[1]
    assert f"python -m vit_jax.train --config=configs/paper/{name}.py:" in docstring
    assert ",digits" in docstring
    assert "Cost" in docstring
    assert "Expected" in docstring


def test_the_page_names_each_file_and_only_files_that_exist(readme):
    for name in FILES:
        assert f"--config=configs/paper/{name}.py:" in readme
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", readme):
        assert (PAPER / path).exists(), path
    headings = re.findall(r"^## (.+)$", readme, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", readme)) <= anchors


def test_the_commands_of_the_page_are_configurations_that_exist(readme):
    commands = re.findall(r"--config=configs/paper/(\w+)\.py:(\S+)", readme)
    assert {name for name, _ in commands} == set(FILES)
    for name, argument in commands:
        assert configuration.to_dict(get(name, argument))
    for argument in re.findall(r"--config=configs/finetune\.py:(\S+)", readme):
        module = importlib.import_module("configs.finetune")
        assert grid.settings(module.get_config(argument))


def test_the_numbers_of_the_page_are_those_measured(readme, results, runner):
    assert set(results) == set(FILES)
    assert runner.update_tables(readme, results) == readme
    # The table, written out for one row.
    row = results["table8"]["1d,stem"]
    last = [100 * curve[-1] for curve in row["curves"]]
    each = ", ".join(f"{accuracy:.1f}%" for accuracy in last)
    assert f"| `1d,stem` | {np.mean(last):.1f}% (accuracy) | {each} |" in readme


def test_what_was_measured_is_every_setting_with_two_seeds_at_least(results, runner):
    for name, settings in runner.EXPERIMENTS.items():
        assert set(results[name]) == {runner.key(setting) for setting in settings}
        for row in results[name].values():
            assert len(row["seeds"]) == len(row["curves"]) >= 2
            assert all(len(curve) == len(row["steps"]) for curve in row["curves"])
            assert row["steps"][-1] == 250
            bound = 1.0 if row["measure"] == "accuracy" else 10.0
            assert 0 <= np.min(row["curves"]) <= np.max(row["curves"]) <= bound


def test_a_run_is_known_by_its_configuration(runner, tmp_path):
    """Experiments share the run of their base; another seed or target is another run."""
    where = lambda name, argument, seed=0, before=None: runner.workdir(
        runner.configure(name, runner.Setting(argument, "", None, before), seed, tmp_path),
        tmp_path,
    )
    base = where("table8", "1d,stem")
    assert where("figure8", "base") == where("figure5", "B/32") == base
    assert where("figure4", "B/32,100%") == where("figure9", "cls_linear,lr=2e-3") == base
    assert where("figure3", "B/32,weight_decay=0.1") == base
    assert where("table8", "1d,stem", seed=1) != base
    tuned = where("masked_patches", "finetune", before="pixels")
    assert tuned != where("masked_patches", "finetune", before="mean_colour")


def test_only_finished_runs_count(runner, tmp_path):
    config = get("table8", "none,digits")
    where = runner.workdir(config, tmp_path)
    assert runner.evaluations(config, tmp_path) == []
    where.mkdir()
    line = '{"step": %d, "eval/loss": 0.5, "eval/accuracy": 0.75}\n'
    log = where / "metrics.jsonl"
    log.write_text(line % 50)
    assert runner.evaluations(config, tmp_path) == []
    log.write_text(line % 50 + '{"step": 250, "train/loss": 0.1}\n' + line % 250)
    assert [record["step"] for record in runner.evaluations(config, tmp_path)] == [50, 250]
