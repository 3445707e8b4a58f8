"""The benchmarks measure what they say; no test here asserts a time."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from benchmarks import (
    exported,
    jax_contestants,
    measure,
    options,
    peers,
    processes,
    report,
    runtime_contestants,
    scaling,
)
from benchmarks.task import CLASSES, Task
from vit_jax import config as configuration
from vit_jax.models import registry
from vit_jax.models.model import count_parameters
from vit_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]
TINY = Task((8, 8), 4, 2, 16, 32, 2, 4, "float32", True, "cpu")
CONDITIONS = {
    "date": "2026-01-02T03:04+00:00",
    "device": "a CPU",
    "backend": "cpu",
    "threads": 2,
    "python": "3.12",
    "versions": {"jax": "1.2"},
    "load_before": [0.1, 0.2, 0.3],
    "load_after": [1.1, 1.2, 1.3],
}


# --- The contestants compute the same ----------------------------------------------------


def test_flax_layers_are_our_network():
    task = TINY._replace(training=False)
    ours = jax_contestants.build("ours", {}, task)
    # Not the zeros of the start, which would hide a wrong bias or token.
    rng, shapes = np.random.default_rng(0), jax.eval_shape(ours.init, jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes
    )
    theirs = jax_contestants.for_flax(params, task.depth)
    other = jax_contestants.build("flax", {}, task)
    expected = jax.eval_shape(other.init, jax.random.key(0))
    assert jax.tree.map(np.shape, theirs) == jax.tree.map(np.shape, expected)
    images = task.example()[0]
    found, wanted = (
        jax.jit(model.apply)(weights, images)[0]
        for model, weights in ((other, theirs), (ours, params))
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_ours_is_what_training_chooses():
    config = configuration.get_config()
    config.model.variant = "S/16"
    model = registry.with_computation_chosen(config).model
    chosen = {"scan": model.scan, "remat": model.remat}
    assert peers.CONTESTANTS[peers.OURS].training == chosen


def test_barriers_make_rematerialisation_work_outside_a_loop():
    # Wide enough that activations, not weights, are what is saved.
    task = TINY._replace(image_size=(32, 32), batch_size=16, depth=4)
    plan = lambda **options: jax_contestants.training("ours", options, task)[1]["program_bytes"]
    assert plan(remat="dots", keep_barriers=True) < 0.8 * plan()


@pytest.mark.parity
@pytest.mark.parametrize("builder", ["timm", "hugging_face"])
def test_others_have_as_many_parameters(builder):
    pytest.importorskip("torch")
    from benchmarks import torch_contestants

    torch_contestants.make_torchvision_importable()
    pytest.importorskip({"hugging_face": "transformers"}.get(builder, builder))
    ours = jax.eval_shape(jax_contestants.build("ours", {}, TINY).init, jax.random.key(0))
    theirs = torch_contestants.BUILDERS[builder](TINY)
    assert sum(each.numel() for each in theirs.parameters()) == count_parameters(ours)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [False, True])
def test_torch_runs(dtype, training):
    pytest.importorskip("torch")
    from benchmarks import torch_contestants

    torch_contestants.make_torchvision_importable()
    pytest.importorskip("timm")
    task = TINY._replace(dtype=dtype, training=training)
    run, facts = torch_contestants.prepare("timm", {}, task, 2)
    run()
    assert set(facts) == {"init"}
    assert torch_contestants.device_peak() is None


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ONNX Runtime", "float32"), ("OpenVINO", "float32"), ("OpenVINO", "bfloat16")],
)
def test_runtimes_compute_what_torch_does(name, dtype, monkeypatch):
    contestant = peers.CONTESTANTS[name]
    if lacks := peers.missing(contestant, "cpu"):
        pytest.skip(lacks)
    assert dtype in contestant.dtypes
    written = []

    def keep(*args):
        written.append(exported.export(*args))
        return written[0]

    monkeypatch.setattr(runtime_contestants, "export", keep)
    task = TINY._replace(training=False, dtype=dtype)
    try:
        run, facts = runtime_contestants.prepare(contestant.builder, {}, task, 2)
    except UserError as error:
        if dtype == "float32" or "which has no bfloat16" not in str(error):
            raise
        pytest.skip(str(error))
    assert set(facts) == {"init"}
    # Later calls need neither the file nor memory that has been given back since.
    assert not written[0][0].exists()
    expected, shape = written[0][1], (task.batch_size, 3, *task.image_size)
    reused = [np.full(shape, 1e3, np.float32) for _ in range(100)]
    assert expected.shape == (TINY.batch_size, CLASSES)
    # They depend on the image by more than what is tolerated.
    assert np.ptp(expected, axis=0).max() > 0.1 * np.abs(expected).max()
    runtime_contestants.check(run(), expected, dtype)
    del reused


@pytest.mark.parametrize(("dtype", "allowed", "refused"), [
    ("float32", 1e-5, 3e-5),
    ("bfloat16", 0.04, 0.06),
])  # fmt: skip
def test_logits_of_a_runtime_must_be_those_of_torch(dtype, allowed, refused):
    expected = np.array([[1.0, -2.0], [0.5, 0.0]])
    error = np.array([[0.0, 0.0], [2.0, 0.0]])
    runtime_contestants.check(expected + allowed * error, expected, dtype)
    for wrong in (expected + refused * error, np.full_like(expected, np.nan)):
        with pytest.raises(UserError, match="differ from torch's"):
            runtime_contestants.check(wrong, expected, dtype)


def test_runtimes_are_for_inference_and_say_why_an_export_failed(tmp_path):
    with pytest.raises(UserError, match="for inference only"):
        runtime_contestants.prepare("openvino", {}, TINY, 2)
    with pytest.raises(UserError, match="could not be exported as paper: KeyError"):
        exported.export("paper", TINY, tmp_path)


BUILT = [
    name
    for name, found in peers.CONTESTANTS.items()
    # Environments change nothing here, and barriers have their own test.
    if found.framework == "jax"
    and not found.environment
    and "keep_barriers" not in found.options
]


@pytest.mark.parametrize("name", BUILT)
def test_every_contestant_of_jax_can_be_built(name):
    contestant = peers.CONTESTANTS[name]
    as_trained = "as_trained" in contestant.options  # which is for inference
    task = TINY._replace(training=not as_trained, dtype=contestant.dtypes[-1], depth=1)
    options = {**contestant.options, **contestant.training}
    run, facts = jax_contestants.prepare(contestant.builder, options, task, 2)
    run()
    assert facts["program_bytes"] > 0
    assert {"init", "trace", "compile"} < set(facts)


# --- Processes ---------------------------------------------------------------------------


def test_contestants_take_turns_and_one_that_fails_does_not_stop_the_others():
    ours = peers.CONTESTANTS[peers.OURS]
    divided = processes.Entry(ours, TINY._replace(devices=2))
    broken = processes.Entry(ours._replace(training={"remat": "some"}), TINY)
    found = processes.measure({"two": divided, "no": broken}, 3, 2, sample=0.0)
    assert found["no"].seconds == []
    assert "model.remat is 'some'" in found["no"].failed
    assert found["two"].failed is None
    assert len(found["two"].seconds) == 3
    assert min(found["two"].seconds) > 0
    facts = found["two"].facts
    assert facts["total"] > facts["import"] + facts["compile"]
    assert facts["peak_bytes"] > facts["import_bytes"] > 10 * 2**20
    assert facts["page_faults"] >= 0


def test_turns_go_back_and_forth():
    assert [processes._order(["a", "b", "c"], number) for number in range(3)] == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ]


def test_a_door_from_flags_to_json_and_page(tmp_path):
    output, page = tmp_path / "found.json", tmp_path / "page.md"
    page.write_text(f"Before.\n\n{report.MARK}\nold\n{report.MARK}\n\nAfter.\n")
    arguments = {
        "models": "mu/16@32",
        "batch_sizes": "2",
        "dtypes": "float32",
        "contestants": "vit_jax",
        "rounds": "2",
        "output": output,
    }
    given = [f"--{name}={value}" for name, value in arguments.items()]
    run = lambda *command: subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True, text=True
    )
    printed = run("benchmarks.inference", *given).stdout
    record = json.loads(output.read_text())
    [row] = record["results"]
    assert row["contestant"] in printed
    assert (row["model"], row["batch_size"], row["dtype"]) == ("mu/16@32", 2, "float32")
    median = np.median(row["seconds"])
    assert row["images_per_second"] == pytest.approx(2 / median)
    share = row["gflops_per_second"] / row["peak_gflops_per_second"]
    assert 0 < row["of_peak"] == pytest.approx(share)
    assert record["conditions"]["backend"] == "cpu"
    assert "jax" in record["conditions"]["versions"]
    assert "## inference" in run("benchmarks.report", f"--page={page}", str(output)).stdout
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "old" not in text
    assert "| mu/16@32 | 2 | float32 | vit_jax |" in text


# --- Numbers -----------------------------------------------------------------------------


def test_ratios_are_taken_within_rounds():
    # The second round met a machine of half the speed; the ratio does not see it.
    found = measure.speed_ratio([1.0, 2.0, 1.0], [2.0, 4.0, 3.0])
    assert found == (2.0, 2.0, 2.5)
    assert measure.speed_ratio([2.0], [1.0]) == (0.5, 0.5, 0.5)


def test_peak_is_the_median_of_the_fastest_library():
    slow, fast = ([4.0, 4.0, 1.0], {}), ([1.0, 2.0, 3.0], {})
    gone = ([], {}, "not here")
    measured = [processes.Measured(*each) for each in (slow, fast, gone)]
    assert measure.peak(measured, 10) == 2 * 10**3 / 2.0
    assert measure.peak(measured[2:], 10) is None


def test_work_by_hand():
    # (5 tokens, width 16) twice: projections, scores and values, MLP; patches; head.
    block = 4 * 5 * 16 * 16 + 2 * 5 * 5 * 16 + 2 * 5 * 16 * 32
    image = 2 * (4 * 4 * 4 * 3 * 16 + 2 * block + 16 * CLASSES)
    assert measure.work(TINY._replace(training=False)) == 4 * image
    assert measure.work(TINY) == 3 * 4 * image


def test_a_row():
    reference = processes.Measured([0.4, 0.8], {"peak_bytes": 100.0})
    found = processes.Measured([0.2, 0.2], {"peak_bytes": 150.0})
    references = {"ratio": reference, "ratio_float32": None}
    row = measure.describe("somebody", found, TINY, 1e6, references)
    assert row["ratio"]["median"] == pytest.approx(3.0)
    assert row["memory_ratio"] == 1.5
    assert row["images_per_second"] == pytest.approx(20.0)
    assert row["of_peak"] == pytest.approx(measure.work(TINY) / 0.2 / 1e6)
    assert "ratio_float32" not in row
    lost = processes.Measured([], {}, "no memory")
    assert measure.describe("x", lost, TINY, 1e6, references) == {
        "contestant": "x",
        "failed": "no memory",
    }


def test_exponents():
    assert scaling.exponent([1, 2, 4], [5.0, 20.0, 80.0]) == pytest.approx(2.0)
    rows = [
        {"axis": "a", "dtype": "d", "value": 2**n, "milliseconds": 3.0**n, "work": 2**n,
         "program_bytes": 7.0}
        for n in range(3)
    ]  # fmt: skip
    fitted = scaling.fit([*rows, {"axis": "a", "value": 99, "failed": "no memory"}])
    assert fitted["time exponent"] == pytest.approx(np.log2(3))
    assert fitted["memory exponent"] == pytest.approx(0)
    assert fitted["work exponent"] == pytest.approx(1)
    assert scaling.fit(rows[:1]) is None


@pytest.mark.parametrize("axis", scaling.AXES)
def test_one_quantity_grows_at_a_time(axis):
    base = scaling.smallest("cpu", "float32")
    value, task = scaling.grown(axis, base, 2)
    changed = {name for name in Task._fields if getattr(task, name) != getattr(base, name)}
    expected = {
        "tokens": {"image_size"},
        "width": {"width", "mlp_dim", "num_heads"},
        "batch": {"batch_size"},
    }
    assert changed == expected.get(axis, {axis})
    start = scaling.grown(axis, base, 1)
    assert start[1] == base
    assert value / start[0] == pytest.approx(2, rel=0.1)


# --- Tables ------------------------------------------------------------------------------


def speeds(**times):
    about = {"model": "S/16", "batch_size": 1, "dtype": "float32"}
    return [
        {**about, "contestant": name, "milliseconds": seconds[0], "seconds": seconds}
        for name, seconds in times.items()
    ]


def test_lead_is_of_the_fastest_of_each():
    rows = speeds(vit_jax=[3.0, 3.0], timm=[4.0, 4.0]) + speeds(
        **{"vit_jax, scan": [2.0, 2.0], "Flax layers": [1.0, 1.0]}
    )
    [lead] = report.leads(rows)
    assert (lead["ours"], lead["theirs"]) == ("vit_jax, scan", "Flax layers")
    assert lead["lead"]["median"] == 0.5
    assert report.leads(rows[:1]) == []


def test_table():
    rows = [
        {"model": "B/16", "of_peak": 0.256, "peak_bytes": 3 * 2**20},
        {"model": "S/16", "failed": "no memory"},
    ]
    assert report.table(rows, ("model", "of_peak", "peak_bytes", "failed")) == (
        "| model | of the product's FLOP/s | peak memory, MiB | failed |\n"
        "|---|---|---|---|\n"
        "| B/16 | 26% | 3 |  |\n"
        "| S/16 |  |  | no memory |"
    )


def test_plots_show_every_group():
    rows = speeds(vit_jax=[1.0], timm=[2.0])
    for row in rows:
        row |= {"ratio": {"median": 1.0, "low": 0.9, "high": 1.2}, "total": 3.0}
    rows += [{**row, "batch_size": 16} for row in rows] + [{**rows[0], "failed": "x"}]
    for benchmark in ("inference", "compile_time"):
        figure = report.plot({"benchmark": benchmark, "results": rows})
        assert [axes.get_title() for axes in figure.axes] == [
            "S/16, batch 1, float32",
            "S/16, batch 16, float32",
        ]
        assert [len(axes.patches) for axes in figure.axes] == [2, 2]
    grown = [
        {"axis": axis, "dtype": "float32", "value": value, "milliseconds": 1.0}
        for axis in ("tokens", "depth", "width")
        for value in (1, 2)
    ]
    figure = report.plot({"benchmark": "scaling", "results": grown})
    assert [axes.get_xlabel() for axes in figure.axes] == ["tokens", "depth", "width", ""]


@pytest.mark.parametrize("text", ["[", "{}", '{"benchmark": "x", "results": []}', "3"])
def test_a_file_of_somebody_else(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="is not what a benchmark wrote"):
        report.read(tmp_path / "x.json")


def test_a_page_needs_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"only one {report.MARK}")
    with pytest.raises(UserError, match="holds <!-- measured --> 1 times"):
        report.fill(page, "x")
    with pytest.raises(UserError, match="cannot be read"):
        report.fill(tmp_path / "none.md", "x")


def test_results_in_the_repository_can_be_shown():
    found = sorted((ROOT / "benchmarks/results").glob("*.json"))
    for path in found:
        assert report.section(report.read(path)).startswith("## ")


# --- Flags -------------------------------------------------------------------------------


def test_shapes():
    cfg = options.shape("Ti/4@32")
    assert (cfg.image_size, cfg.grid, cfg.width) == ((32, 32), (8, 8), 192)
    assert cfg.gelu == "erf"
    task = options.make_task(cfg, 128, "bfloat16", True, "gpu")
    assert task.shape.items() <= vars(cfg).items()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("S/16@big", "--models has 'S/16@big'"),
        ("R50+B/16", "peers do not have in this form"),
        ("Mixer-B/16", "peers do not have in this form"),
        ("Q/16", "no size 'Q'"),
    ],
)
def test_unknown_networks(name, message):
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        options.shape(name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--batch_sizes=0"], "--batch_sizes has '0'"),
        (["--dtypes=float16"], "--dtypes has 'float16'"),
    ],
)
def test_flags_that_cannot_be(given, message, monkeypatch):
    monkeypatch.setattr(flags, "FLAGS", values := flags.FlagValues())
    for name in ("models", "batch_sizes", "dtypes"):
        flags.DEFINE_list(name, ["Ti/16"] if name == "models" else ["4"], "", values)
    values.dtypes = ["float32"]
    values(["x", *given])
    session = options.Session(2, "cpu", False, {})
    with pytest.raises(UserError, match=message):
        options.tasks(session, "S/16", {"cpu": [1]}, training=False)


def test_contestants_that_are_not_here():
    with pytest.raises(UserError, match="--contestants has 'nobody'"):
        peers.choose(["nobody"], (), "cpu")
    assert "timm" not in [found.name for found in peers.choose(None, ("timm",), "tpu")]
    kept = peers.CONTESTANTS["vit_jax, memory kept"]
    assert not peers.is_here(kept, "gpu")


def test_who_is_left_out_is_said(capsys, monkeypatch):
    names = (peers.OURS, "ONNX Runtime", "OpenVINO")
    installed = lambda name: None if name in ("openvino", "onnxscript") else object()
    monkeypatch.setattr(peers.importlib.util, "find_spec", installed)
    assert [found.name for found in peers.choose(None, names, "cpu")] == [peers.OURS]
    assert capsys.readouterr().err.splitlines() == [
        "note: ONNX Runtime is left out: onnxscript not installed",
        "note: OpenVINO is left out: openvino not installed",
    ]
    with pytest.raises(UserError, match=r"'OpenVINO', which is not here: .*\[bench\] extra"):
        peers.choose(["OpenVINO"], names, "cpu")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert [found.name for found in peers.choose(None, names, "cpu")] == list(names)
    assert capsys.readouterr().err == ""
    assert [found.name for found in peers.choose(None, names, "gpu")] == [peers.OURS]
    assert "note: OpenVINO is left out: it needs a CPU" in capsys.readouterr().err
