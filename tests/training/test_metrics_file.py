import json
import os
import tracemalloc

import pytest

from vit_jax.training import metrics_file
from vit_jax.training.logging import MetricWriter, read_metrics


def write(path, *lines):
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def go_on(folder, step, saved=None):
    with MetricWriter(folder, step, 100, saved) as log:
        return log


def test_a_bad_line_costs_itself_and_the_file_as_it_was_stays(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 1, "a": 1}, "[" * 200_000, '{"step": 2,', {"step": 3, "a": 3})
    before = path.read_bytes()
    go_on(tmp_path, 3)
    assert steps(path) == [1, 3]
    assert (tmp_path / "metrics.damaged-1.jsonl").read_bytes() == before
    said = capsys.readouterr().err
    assert "2 lines that cannot be read, the first of them line 2" in said
    go_on(tmp_path, 3)
    assert "warning" not in capsys.readouterr().err
    assert not (tmp_path / "metrics.damaged-2.jsonl").exists()


def test_each_record_stands_once_and_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = [{"step": i, "a": i} for i in range(1, 6)]
    write(path, *first, {"step": 5, "eval/count": 9}, *first[1:], {"step": 6, "a": 6})
    go_on(tmp_path, 6)
    kept = [*first, {"step": 5, "eval/count": 9}, {"step": 6, "a": 6}]
    assert read_metrics(path) == kept
    assert (tmp_path / "metrics.damaged-1.jsonl").exists()


def test_a_step_made_large_by_a_flipped_bit_takes_no_others_with_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 1}, {"step": 200}, {"step": 3}, {"step": 4}, {"step": 5})
    go_on(tmp_path, 4)
    assert steps(path) == [1, 3, 4]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_the_last_record_of_a_saved_step_is_put_back(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 4, "a": 0.1}, {"step": 5, "a": 1 / 3}]
    write(path, *records)
    os.truncate(path, path.stat().st_size - cut)
    log = go_on(tmp_path, 5, records[1])
    assert read_metrics(path) == records
    assert log.last == records[1] or cut > 1
    go_on(tmp_path, 4, records[1])  # of a later state than the one that could be read
    assert read_metrics(path) == records[:1]


def test_the_evaluation_of_the_step_is_found(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 4, "a": 1}, {"step": 4, "eval/count": 7}, {"step": 5, "a": 1})
    assert go_on(tmp_path, 4).evaluation() == {"step": 4, "eval/count": 7}
    assert go_on(tmp_path, 3).evaluation() is None


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *({"step": i, "a": i / 7, "b": i / 11} for i in range(20_000)))
    tracemalloc.start()
    found = metrics_file.find(path, 15_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.in_order
    assert found.last["step"] == 15_000
    assert peak < 2_000_000


def test_what_was_written_is_on_the_disk_when_a_state_is_saved(tmp_path, monkeypatch):
    synced = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: synced.append(os.fstat(n).st_ino) or original(n))
    with MetricWriter(tmp_path, 0, 10) as log:
        log.write(1, {"a": 1.0})
        synced.clear()
        log.sync()
        assert (tmp_path / "metrics.jsonl").stat().st_ino in synced


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_what_is_of_the_wrong_kind_is_an_error_with_its_name(tmp_path, name):
    (tmp_path / name).mkdir() if name == "metrics.jsonl" else (tmp_path / name).touch()
    with pytest.raises(OSError, match=name):
        go_on(tmp_path, 0)


def test_a_full_disk_is_an_error_of_whoever_writes(tmp_path):
    log = MetricWriter(tmp_path, 0, 10)
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - the writer closes it
    with pytest.raises(OSError, match=r"No space left on device.*metrics\.jsonl"), log:
        log.write(1, {"a": 1.0})


NUMBERS = (0, -1, 10**29, 0.1, -2.5e-7, 1e300, float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_written_is_known_without_reading_its_numbers(tmp_path, monkeypatch, number):
    """What takes most of the time of a resume is not done for millions of lines."""
    path = tmp_path / "metrics.jsonl"
    write(path, *({"step": i, "eval/loss": number, "mesh.data (s)": 1} for i in range(3)))
    monkeypatch.setattr(metrics_file, "_step", None)
    found = metrics_file.find(path, 2)
    assert (found.in_order, found.last["step"]) == (True, 2)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "step": 2}', '{"step": 1, "\\u0073tep": 2}', '{"step": 01}',
        '{"step": 1.0}',
        '{"step": -1}', '{"step": 1, "a": 01}', '{"step": 1, "a": 1.}', '{"step": 1, "a": +1}',
        '{"step": 1, "a": 1e}', '{"step": 1, "a": -NaN}', '{"step": 1, "a": }', '{"step": 1,}',
        '{"step": 1, "a": 1', '{"step": 1, "a"b": 1}',
        '{"step": 1} ', '{"step": 1}}', '{"step": 1, "a": "}',
        '{"step": 1, "a": {"b": 2}}', '{"step": 1, "stepped": 2}', '{"step": 1, "a\tb": 2}',
        '{"step": 1, "a": ' + "9" * 5000 + "}", '{"step": ' + "9" * 30 + "}",
    ],
)  # fmt: skip
def test_a_line_is_a_record_if_json_says_so(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    [found] = metrics_file.lines(tmp_path / "metrics.jsonl")
    try:
        expected = json.loads(line)["step"]
    except ValueError:
        expected = None
    assert found.step == (expected if type(expected) is int else None)


def test_a_file_that_is_endless_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match=r"1,099,511,627,776 bytes, more than"):
        go_on(tmp_path, 1)
