"""Work directories of before: parameters of layout 1 are read, and resumed bit for bit."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.tiny_config import tiny
from vit_jax import config as configuration
from vit_jax.checkpoints import older, orbax_io, trained
from vit_jax.checkpoints.directory import Checkpoints, abstract
from vit_jax.distributed import sharding
from vit_jax.training import trainer
from vit_jax.training.run import build


def config_of(objective):
    config = tiny(total_steps=4.0)
    configuration.set_duration(config, "checkpoint_every", steps=2)
    configuration.set_duration(config, "eval_every", steps=2)
    config.objective.name = objective
    if objective == "masked_patches":
        config.data.mixup = 0.0
        config.model.representation_size = None
    return config


def as_before(workdir, step, config, to):
    """A copy of `workdir` whose newest state, of `step`, is written as layout 1 has it."""
    run = build(config)
    target = abstract(run.learning.abstract_state, run.learning.shardings)
    state = orbax_io.restore(workdir / "checkpoints" / str(step), target)
    card = dict(orbax_io.card(workdir / "checkpoints" / str(step)))
    for key in ("layout", "averaged", "frozen"):
        del card[key]
    to.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(workdir / name, to)
    with Checkpoints(to, 2) as checkpoints:
        checkpoints.save(step, older.to_layout_1(state), card)
        weights = older.to_layout_1(state.eval_params)
        checkpoints.save_if_best(step, weights, card | {"metrics": {}}, 1e9)


@pytest.mark.parametrize("objective", ["classification", "masked_patches"])
def test_a_work_directory_of_before_is_opened_and_resumed(tmp_path, objective):
    whole, before = tmp_path / "whole", tmp_path / "before"
    trainer.train(config_of(objective), whole)
    as_before(whole, 2, config_of(objective), before)
    saved = orbax_io._read_to_host(before / "checkpoints" / "2")
    assert not any("/model/" in name or "/objective/" in name for name in saved)
    own = {name for name in saved if "masked_patches" in name}
    assert bool(own) == (objective == "masked_patches")

    mesh = sharding.make_mesh()
    for which in ("last", "best"):
        old = trained.load(before, which, mesh).params
        new = trained.load(whole, "2", mesh).params
        jax.tree.map(np.testing.assert_array_equal, old, new)

    assert trainer.train(config_of(objective), before) == trainer.train(
        config_of(objective), whole
    )
    states = [orbax_io._read_to_host(w / "checkpoints" / "4") for w in (whole, before)]
    assert states[0].keys() == states[1].keys()
    for name, x in states[0].items():
        np.testing.assert_array_equal(states[1][name], x, err_msg=name)
    assert json.loads((before / "checkpoints/4/card/metadata").read_text())["layout"] == 2
