import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.checkpoints.directory import Checkpoints, abstract, load_card, load_params
from vit_jax.distributed import sharding
from vit_jax.system.errors import UserError
from vit_jax.training.step import TrainState

CARD = {"config": {"ema_decay": 0.0}, "class_names": ["cat", "dog"]}
MESH = sharding.make_mesh()
EVERYWHERE = sharding.replicated(MESH)


def state(step):
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3) + step}, "b": jnp.float32(step)}
    return TrainState(jnp.int32(step), params, optax.adam(1e-3).init(params), {}, {})


def target():
    return abstract(jax.eval_shape(lambda: state(0)), EVERYWHERE)


def save(workdir, steps, keep=2):
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), CARD)


def damage(workdir, step):
    """Cuts every data file of a checkpoint in half."""
    files = [
        p for p in (workdir / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()
    ]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_is_restored_is_what_was_saved(tmp_path):
    save(tmp_path, [3])
    with Checkpoints(tmp_path, 2) as checkpoints:
        restored = checkpoints.restore(target())
        card = checkpoints.card()
    assert jax.tree.structure(restored) == jax.tree.structure(state(3))
    jax.tree.map(np.testing.assert_array_equal, restored, state(3))
    assert restored.params["b"].sharding == EVERYWHERE
    assert card == {**CARD, "step": 3}


def test_saving_may_go_on_while_the_state_is_donated(tmp_path):
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, 5) as checkpoints:
        current = jax.device_put(state(0), EVERYWHERE)
        for step in range(1, 4):
            current = update(current)
            checkpoints.save(step, current, CARD)
        for _ in range(3):
            current = update(current)
    for step in (1, 2, 3):
        params = load_params(tmp_path / "checkpoints" / str(step), target().params)
        assert float(params["b"]) == step


def test_the_last_few_are_kept_and_the_best_beside_them(tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step, score in [(1, 0.5), (2, 0.9), (3, 0.7), (4, 0.9)]:
            checkpoints.save(step, state(step), CARD)
            checkpoints.save_if_best(step, state(step).params, CARD, score)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]
    assert load_card(tmp_path, "best")["step"] == 2  # the first of equals
    assert float(load_params(tmp_path / "best" / "2", target().params)["b"]) == 2
    assert load_card(tmp_path)["step"] == 4
    with Checkpoints(tmp_path, 2) as checkpoints:  # the score outlives the process
        checkpoints.save_if_best(5, state(5).params, CARD, 0.8)
    assert load_card(tmp_path, "best")["step"] == 2


def test_averaged_weights_are_preferred(tmp_path):
    averaged = state(1).replace(ema=jax.tree.map(lambda x: x + 100, state(1).params))
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, averaged, {**CARD, "config": {"ema_decay": 0.9}})
    assert float(load_params(tmp_path / "checkpoints" / "1", target().params)["b"]) == 101


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, capsys):
    save(tmp_path, [1, 2])
    damage(tmp_path, 2)
    with Checkpoints(tmp_path, 2) as checkpoints:
        restored = checkpoints.restore(target())
        assert int(restored.step) == 1
        checkpoints.save(2, state(2), CARD)  # and its step can be written again
    warning = capsys.readouterr().err
    assert f"checkpoint {tmp_path / 'checkpoints' / '2'} is damaged" in warning
    assert "falling back" in warning
    reason = (tmp_path / "unreadable" / "2-0" / "reason.txt").read_text()
    assert f"({reason.strip()})" in warning
    assert int(load_card(tmp_path)["step"]) == 2


def test_nothing_intact_is_no_fresh_start_unless_told_to(tmp_path):
    save(tmp_path, [1, 2])
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    for _ in range(2):  # now, and whenever the same command is run again
        with (
            Checkpoints(tmp_path, 2) as checkpoints,
            pytest.raises(UserError, match=r"the damaged ones \(1-0, 2-0\).*--begin_anew"),
        ):
            checkpoints.restore(target())
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.restore(target(), begin_anew=True) is None
        checkpoints.save(3, state(3), CARD)
    with Checkpoints(tmp_path, 2) as checkpoints:  # what lies there no longer matters
        assert int(checkpoints.restore(target()).step) == 3


def test_an_unfinished_write_is_not_a_checkpoint(tmp_path):
    save(tmp_path, [1])
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert int(checkpoints.restore(target()).step) == 1


def test_an_empty_work_directory_has_none(tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.restore(target()) is None
        assert checkpoints.card() is None


def test_doors_say_what_there_is(tmp_path):
    with pytest.raises(UserError, match="has no checkpoints/ folder"):
        load_card(tmp_path)
    save(tmp_path, [1, 2])
    with pytest.raises(UserError, match="has no checkpoint '7': it holds 1, 2"):
        load_card(tmp_path, "7")


def test_a_signal_is_told_how_long_a_save_takes_and_what_stands_without_it(tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.announcement(state(1)) == (
            "saving 0.1 KiB (how long that takes is unknown); if the process is killed before "
            "that is done, nothing is what it continues from"
        )
    save(tmp_path, [1])
    with Checkpoints(tmp_path, 2) as checkpoints:
        told = checkpoints.announcement(state(2))
    assert re.fullmatch(
        r"saving .* KiB \(the last save took \d+\.\d s\); .*, step 1 is .*", told
    )


FULL = """
import resource, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp
from vit_jax.system.errors import UserError
from vit_jax.checkpoints.directory import Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {f"k{i}": jax.random.normal(jax.random.key(i), (700, 500)) for i in range(60)}
card = {"config": {}, "class_names": []}
for attempt in range(2):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    try:
        with Checkpoints(Path(sys.argv[1]) / str(attempt), 2) as checkpoints:
            checkpoints.save(1, state, card)
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""


def test_a_full_disk_is_said_once(tmp_path):
    """Two of three such saves would show dozens of tracebacks."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("could not be written") == 2, done.stderr
    assert "Event loop is closed" not in done.stderr
    assert "Traceback" not in done.stderr
