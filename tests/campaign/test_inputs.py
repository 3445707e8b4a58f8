"""The short form of hostile inputs, and that what does wrong is found out."""

import time

import pytest

from tests.campaign import inputs
from vit_jax.system.errors import UserError


@pytest.mark.campaign
def test_hostile_inputs_are_refused_in_one_line_or_read_right(tmp_path):
    done = inputs.trials_of(tmp_path, trials=100, seed=0)
    assert [trial for trial in done if trial.outcome not in ("refused", "read")] == []
    assert len(done) == 100
    assert {trial.outcome for trial in done} == {"refused", "read"}


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("use", "outcome"),
    [
        (lambda: None, "read"),
        (lambda: raise_(UserError("one line")), "refused"),
        (lambda: raise_(KeyError("x")), "wrong: Traceback"),
        (lambda: bytearray(b"x") * (85 << 20), "wrong: 8"),
        (lambda: burn(0.2), "wrong: took 0"),
    ],
)
def test_the_judge_finds_other_errors_memory_and_time(monkeypatch, use, outcome):
    monkeypatch.setattr(inputs, "SECONDS", 0.15)
    assert inputs._judge(use, 50 << 20)[0].startswith(outcome)


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("end", ["hangs", "dies"])
def test_what_hangs_or_ends_the_process_is_wrong_and_the_next_ones_follow(
    tmp_path, monkeypatch, end
):
    """The process is a script that comes to that in its second trial."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/bash\n"
        'say() { echo \'{"kind": "k", "what": "w"\'"$1"\'}\'; }\n'
        "mkdir $3/input\n"
        'say \', "outcome": "read"\'\n'
        "say ''\n"
        f"{'exec sleep 60' if end == 'hangs' else 'exit 3'}\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(inputs.sys, "executable", str(script))
    monkeypatch.setattr(inputs, "HANG", 0.5)
    done = inputs.trials_of(tmp_path, 4, 0)
    outcomes = [trial.outcome for trial in done]
    assert outcomes[0] == outcomes[2] == "read"
    told = "wrong: hangs" if end == "hangs" else "wrong: the process ended with 3"
    assert outcomes[1].startswith(told)
    assert outcomes[3].startswith(told)
    assert "kept in" in outcomes[1]
