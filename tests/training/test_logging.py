import json

import pytest

from vit_jax.training.logging import MetricWriter, read_metrics


def test_one_json_object_a_line_and_a_readable_one(tmp_path, capsys):
    with MetricWriter(tmp_path, 0, 10) as log:
        log.write(5, {"train/loss": 0.5, "eval/count": 360, "lr": 1e-6})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 5, "train/loss": 0.5, "eval/count": 360, "lr": 1e-6}
    ]
    out = capsys.readouterr()
    assert out.out == "step 5/10  train/loss 0.5000  eval/count 360  lr 1e-06\n"
    assert out.err == ""  # no progress bar in a pipe


def test_resuming_drops_later_steps_and_a_line_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.5}\n{"step": 2, "a": 2.5}\n{"step": 3, "a": 3}\n{"st')
    with MetricWriter(tmp_path, 2, 10) as log:
        assert log.last == {"step": 2, "a": 2.5}
        log.write(3, {"a": 3.5})
    assert read_metrics(path) == [
        {"step": 1, "a": 1.5},
        {"step": 2, "a": 2.5},
        {"step": 3, "a": 3.5},
    ]


def test_tensorboard_reads_the_same_numbers(tmp_path):
    with MetricWriter(tmp_path, 0, 10) as log:
        for step in range(1, 6):
            log.write(step, {"train/loss": 1 / step})
    with MetricWriter(tmp_path, 3, 10) as log:  # steps 4 and 5 are made again
        log.write(4, {"train/loss": 0.75})
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    found = {e.step: e.value for e in accumulator.Scalars("train/loss")}
    assert found == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3, 4: 0.75})
