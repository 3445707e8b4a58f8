from types import SimpleNamespace

import pytest

from tests.tiny_config import tiny
from vit_jax.system.errors import UserError
from vit_jax.training import reporting, trainer
from vit_jax.training.logging import read_metrics
from vit_jax.training.reporting import parse_profile


def test_a_profile_is_two_steps():
    assert parse_profile("10:20") == (10, 20)
    assert parse_profile("3:3") == (3, 3)
    assert parse_profile(None) is None


@pytest.mark.parametrize("text", ["10", "20:10", "0:3", "a:b", "1:2:3", "", "-1:2"])
def test_what_is_no_profile_is_one_sentence(text):
    with pytest.raises(UserError, match=r"profile is .*10:20"):
        parse_profile(text)


def test_a_trace_is_written_and_the_rest_logged_as_ever(tmp_path):
    """Also where training ends before the last step to trace."""
    config = tiny(total_steps=3.0, profile="3:9")
    trainer.train(config, tmp_path)
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 10_000
    assert list(trace.parent.glob("perfetto_trace.json.gz"))
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert all(0 <= r["data_wait"] <= 1 for r in records)


def test_utilisation_is_work_by_time_by_the_measured_peak(tmp_path, monkeypatch):
    # The beginning; of each step, when the wait for its data begins and ends; the end.
    clock = iter([0.0, 0.0, 0.5, 2.0, 2.5, 7.0, 8.0, 12.0])
    monkeypatch.setattr(reporting, "time", SimpleNamespace(monotonic=clock.__next__))
    written = []
    log = SimpleNamespace(write=lambda step, x: written.append(x), progress=lambda step: None)
    due = lambda step: step in (1, 3)
    reporter = reporting.Reporter(log, due, 8, 5e9, 2e10, tmp_path)
    for step in (1, 2, 3):
        with reporter.waiting():
            pass
        reporter.add(step, {"train/loss": 1.0})
    reporter.flush()
    # One step of 5 GFLOPs in 2 seconds, then two in 10, where 20 GFLOP/s are possible.
    assert [x["mfu"] for x in written] == pytest.approx([0.125, 0.05])
    assert [x["images_per_second"] for x in written] == pytest.approx([4.0, 1.6])
    assert [x["data_wait"] for x in written] == pytest.approx([0.25, 0.15])


def test_the_peak_is_a_speed_that_processors_have():
    assert 1e9 < reporting.matmul_peak("float32") < 1e14
