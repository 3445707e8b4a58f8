"""The benchmark of steps on TPUs that need not be there, on devices that are."""

import jax
import pytest

from benchmarks import precision, tpu_step
from vit_jax.models import devices
from vit_jax.planning.chips import CHIPS
from vit_jax.planning.target import Target
from vit_jax.system.errors import UserError


def test_two_formulations_of_one_network_are_planned_and_compared():
    chip = CHIPS["TPU v5 lite"]
    target = Target("two devices", jax.devices()[:2], chip, (2,), int(chip.memory))
    rows = [tpu_step.measure("mu/16", target, name, 1) for name in ("vit_jax", "Flax layers")]
    for row in rows:
        assert row["traffic"] > 0
        assert row["memory"] > 0
        assert 0 < len(row["movers"]) <= 10
        assert row["sent"] > 0  # gradients
    ours, theirs = rows
    cells = [cell.strip() for cell in tpu_step.table(rows).splitlines()[2].split("|")][1:-1]
    named = dict(zip(tpu_step.HEAD[:6], cells, strict=False))
    assert named["formulation"] == "vit_jax"
    assert named["GB moved"] == f"{ours['traffic'] / 1e9:.1f}"
    assert named["of Flax layers'"] == f"{ours['traffic'] / theirs['traffic']:.2f}"
    assert "Dense" in tpu_step.movers(ours)


def test_a_refusal_is_a_row_too():
    row = {
        "model": "B/16", "topology": "v5e:4x4", "per_device_batch": 9, "formulation": "vit_jax",
        "traffic": None, "memory": 20 << 30, "sent": 0, "estimate": None, "movers": [],
        "refusal": "too large",
    }  # fmt: skip
    assert "| refused | " in tpu_step.table([row])
    assert "| 20.00 | " in tpu_step.table([row])
    assert "| not known | " in tpu_step.table([row | {"refusal": None}])


@pytest.mark.parametrize(
    ("models", "topologies", "message"),
    [
        (["B/17"], ["v5e:4x4"], "--models has 'B/17': use some of B/16"),
        (["B/16"], ["v7:4x4"], "--topology has 'v7:4x4', whose chip 'v7' is not known here"),
    ],
)
def test_what_it_does_not_know_is_named(models, topologies, message):
    with pytest.raises(UserError, match=message):
        tpu_step.check(models, topologies)


def test_the_formulations_differ_in_nothing_but_the_network():
    ours, theirs = (tpu_step.configuration("H/14", n) for n in ("vit_jax", "Flax layers"))
    assert (ours.model.unroll, theirs.model.unroll) == (1, None)  # a loop in both
    theirs.model.unroll = 1
    assert ours.to_dict() == theirs.to_dict()
    assert ours.model.scan


def test_precision_forces_the_rules_of_another_platform_for_a_while():
    assert devices.platform() == "cpu"
    with precision.taken_for("tpu"):
        assert devices.platform() == "tpu"
    assert devices.platform() == "cpu"


def test_an_idx_file_that_is_not_there_is_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        precision.load("fashion", tmp_path)
