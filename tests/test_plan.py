"""Plans: what is read off compiled programs, the estimates made of it, and the command."""

import dataclasses
import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.commands import TINY, assert_one_sentence, call, run
from tests.tiny_config import tiny
from vit_jax import config as configuration
from vit_jax.distributed import sharding
from vit_jax.models import registry, tpu_attention
from vit_jax.models.flops import train_flops
from vit_jax.planning import data_sets, page, roofline
from vit_jax.planning.chips import CHIPS, interconnect
from vit_jax.planning.products import product_flops
from vit_jax.planning.program import Array, Collective, Mover, Program, arrays, sent
from vit_jax.planning.search import best, largest, search
from vit_jax.planning.step import Memory, Plan, gib, make_plan, refused, undivided
from vit_jax.planning.target import Target, topology
from vit_jax.system.errors import UserError
from vit_jax.training.optimizer import make_optimizer
from vit_jax.training.program import build_learning

ROOT = Path(__file__).parent.parent
FOUR = jax.devices()[:4]
HERE = Target("four devices", FOUR, None, (), None)
LIBTPU = importlib.util.find_spec("libtpu") is not None


# --- Programs -----------------------------------------------------------------------------

# As a TPU prints them, shortened: two loops' worth of everything that is read off.
TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%body (p: (s32[], bf16[64,128], f32[6,16,128])) -> (s32[], bf16[64,128], f32[6,16,128]) {
  %p = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, f32[6,16,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = f32[6,16,128]{2,1,0:T(8,128)} get-tuple-element(%p), index=2
  %slice = f32[1,16,128]{2,1,0:T(8,128)} fusion(%w, %i), kind=kLoop, calls=%slice_layer
  %ag = f32[1,128,128]{2,1,0:T(8,128)S(1)} all-gather(%slice), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={1}
  %y = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%x, %ag), kind=kOutput, calls=%product
  ROOT %t = (s32[], bf16[64,128]{1,0}, f32[6,16,128]) tuple(%i, %y, %w)
}

%slice_layer (a: f32[6,16,128], b: s32[]) -> f32[1,16,128] {
  %a = f32[6,16,128]{2,1,0:T(8,128)} parameter(0)
  %b = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %ds = f32[1,16,128]{2,1,0:T(8,128)} dynamic-slice(%a, %b, %zero, %zero), dynamic_slice_sizes={1,16,128}
}

%product (a.1: bf16[64,128], b.1: f32[1,128,128]) -> bf16[64,128] {
  %a.1 = bf16[64,128]{1,0} parameter(0)
  %b.1 = f32[1,128,128]{2,1,0} parameter(1)
  ROOT %conv = bf16[64,128]{1,0} convolution(%a.1, %b.1), dim_labels=bf_io->bf
}

%condition (q: (s32[], bf16[64,128], f32[6,16,128])) -> pred[] {
  %q = (s32[], bf16[64,128], f32[6,16,128]) parameter(0)
  %end = s32[]{:T(128)} constant(7)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %end), direction=LT
}

%all-reduce-scatter.1 (input: f32[128,128]) -> f32[16,128] {
  %input = f32[128,128]{1,0} parameter(0)
  %all-reduce.4 = f32[128,128]{1,0} all-reduce(%input), channel_id=6, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %part = f32[16,128]{1,0} dynamic-slice(%all-reduce.4), dynamic_slice_sizes={16,128}
}

%starts (s: bf16[8,128]) -> (bf16[8,128], bf16[32,128]) {
  %s = bf16[8,128]{1,0} parameter(0)
  %ag.1 = bf16[32,128]{1,0} all-gather(%s), channel_id=8, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %cc = (bf16[8,128], bf16[32,128]) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%ends (e: bf16[8,128]) -> bf16[32,128] {
  %e = bf16[8,128]{1,0} parameter(0)
  %ag.2 = bf16[32,128]{1,0} all-gather(%e), channel_id=8, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %cd = bf16[32,128] custom-call(%e, %ag.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x0: bf16[64,128], w0: f32[6,16,128], g0: f32[128,128], s0: bf16[8,128]) -> f32[16,128] {
  %x0 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w0 = f32[6,16,128]{2,1,0:T(8,128)} parameter(1)
  %g0 = f32[128,128]{1,0:T(8,128)S(1)} parameter(2)
  %s0 = bf16[8,128]{1,0:T(8,128)S(1)} parameter(3)
  %one = s32[]{:T(128)} constant(1)
  %begin = s32[]{:T(128)} copy(%one)
  %init = (s32[], bf16[64,128], f32[6,16,128]) tuple(%begin, %x0, %w0)
  %loop = (s32[], bf16[64,128], f32[6,16,128]) while(%init), condition=%condition, body=%body
  %st = (bf16[8,128]{1,0:S(1)}, bf16[32,128]{1,0:S(1)}) fusion(%s0), kind=kCustom, calls=%starts
  %en = bf16[32,128]{1,0:S(1)} fusion(%s0), kind=kCustom, calls=%ends
  ROOT %out = f32[16,128]{1,0:T(8,128)} fusion(%g0), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_a_loop_counts_as_often_as_it_runs_and_a_started_collective_once():
    found = {(c.kind, c.devices): c for c in Program(TEXT).collectives()}
    shard, part = 16 * 128 * 4, 8 * 128 * 2
    assert found == {
        # From 1 to 7: six layers, each gathering seven shards from the others.
        ("all-gather", 8): Collective(
            "all-gather", 8, 6, 6 * shard, 6 * 7 * shard, "f32[1,128,128]"
        ),
        ("all-gather", 4): Collective("all-gather", 4, 1, part, 3 * part, "bf16[32,128]"),
        ("reduce-scatter", 8): Collective(
            "reduce-scatter", 8, 1, 128 * 128 * 4, 128 * 128 * 4 * 7 / 8, "f32[128,128]"
        ),
    }


def test_traffic_is_what_goes_to_the_main_memory():
    shard, tokens = 16 * 128 * 4, 64 * 128 * 2
    # A layer reads its slice of the weights, writes it, and the gather reads it; what it
    # gathers stays on the chip. The product reads and writes the tokens.
    layer = 3 * shard + 2 * tokens
    # An integer is read by the slice; two are compared, which writes one truth value.
    counting = 4 + (2 * 4 + 1)
    # Outside, the counter is copied and the part of the gradients is written.
    outside = 2 * 4 + 16 * 128 * 4
    assert Program(TEXT).traffic() == 6 * (layer + counting) + outside


# A fusion inside of a fusion that only gives a parameter another shape, as before a product.
VIEWED = """\
HloModule viewed, is_scheduled=true

%view (v: bf16[4,64,128]) -> bf16[256,128] {
  %v = bf16[4,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %b = bf16[256,128]{1,0:T(8,128)(2,1)} bitcast(%v)
}

%product (p: bf16[4,64,128], w: bf16[128,128]) -> bf16[256,128] {
  %p = bf16[4,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %shaped = bf16[256,128]{1,0:T(8,128)(2,1)} fusion(%p), kind=kLoop, calls=%view
  ROOT %conv = bf16[256,128]{1,0:T(8,128)(2,1)} convolution(%shaped, %w), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[4,64,128], k: bf16[128,128]) -> bf16[256,128] {
  %x = bf16[4,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %y = bf16[256,128]{1,0:T(8,128)(2,1)} fusion(%x, %k), kind=kOutput, calls=%product, metadata={op_name="jit(step)/transpose(jvp(ViT))/Transformer/while/body/checkpoint/encoderblock_3/MlpBlock_0/Dense_1/dot_general"}
}
"""  # noqa: E501


def test_what_is_read_through_another_shape_is_read():
    assert Program(VIEWED).traffic() == 2 * 256 * 128 * 2  # the tokens, in and out


def test_movers_name_the_part_of_the_network_and_add_up_to_the_traffic():
    [mover] = Program(VIEWED).movers()
    assert mover == Mover(
        "backward", "Transformer/encoderblock/MlpBlock_0/Dense_1", "dot_general",
        2 * 256 * 128 * 2, 1, "bf16[256,128]",
    )  # fmt: skip
    program = Program(TEXT)
    movers = program.movers()
    assert sum(mover.bytes for mover in movers) == program.traffic()
    assert [mover.bytes for mover in movers] == sorted(
        (mover.bytes for mover in movers), reverse=True
    )
    assert {mover.part for mover in movers} == {"moved by XLA"}  # this text names nothing
    assert {mover.runs for mover in movers if mover.operation == "all-gather"} == {6}


def test_a_page_shows_the_largest_movers():
    mover = Mover(
        "forward", "encoderblock/MlpBlock_0/Dense_0", "dot_general", 3 * 10**9, 24, "x"
    )
    plan = dataclasses.replace(planned(8, 1 << 30), traffic=4 * 10**9, movers=(mover,))
    lines = page.describe(
        dataclasses.replace(plan, seconds={"compile": 1.0}, collectives=())
    ).splitlines()
    [head] = [line for line in lines if line.startswith("traffic")]
    assert "4.00 GB" in head
    assert "75% of it" in head
    assert any("3.00 GB" in line and "MlpBlock_0/Dense_0" in line for line in lines)


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    program = Program(TEXT.replace("copy(%one)", "multiply(%one, %one)"))
    assert {c.count for c in program.collectives() if c.devices == 8} == {1}
    assert program.unknown_loops == {"loop"}


def test_arrays_know_their_size_with_and_without_padding():
    [scores] = arrays("bf16[2,3,197,197]{3,2,1,0:T(8,128)(2,1)S(1)}")
    assert scores == Array("bf16", (2, 3, 197, 197), "3,2,1,0:T(8,128)(2,1)S(1)")
    assert scores.bytes == 6 * 197 * 197 * 2
    assert scores.padded_bytes == 6 * 200 * 256 * 2
    assert not scores.in_main_memory
    [turned] = arrays("f32[5,300]{0,1:T(8,128)}")
    assert turned.padded_bytes == 304 * 128 * 4
    assert [a.bytes for a in arrays("(pred[7]{0}, s4[6], f8e4m3fn[3], token[], f64[])")] == [
        7, 3, 3, 0, 8,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", 3 * 80),
        ("reduce-scatter", 60),
        ("all-reduce", 120),
        ("all-to-all", 60),
        ("collective-permute", 80),
    ],
)
def test_bytes_sent_around_a_ring_of_four(kind, expected):
    assert sent(kind, 80, 4) == expected


def test_collectives_of_a_compiled_program_with_divided_weights():
    """Six layers, weights divided by four: gathered forward and backward, gradients reduced."""
    config = configuration.get_config()
    config.mesh.fsdp = 4
    mesh = sharding.make_mesh(config.mesh, FOUR)
    place = lambda spec: NamedSharding(mesh, spec)

    def loss(w, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, place(PartitionSpec()))
            x = jax.lax.with_sharding_constraint(x @ w, place(PartitionSpec("fsdp")))
            return x, None

        return jax.lax.scan(layer, x, w)[0].sum()

    weights = place(PartitionSpec(None, "fsdp"))
    w = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=weights)
    x = jax.ShapeDtypeStruct((256, 64), jnp.float32, sharding=place(PartitionSpec("fsdp")))
    step = jax.jit(jax.grad(loss), out_shardings=weights)
    program = Program(step.lower(w, x).compile().as_text())
    found = {c.kind: c for c in program.collectives()}
    layer = 64 * 64 * 4
    assert not program.unknown_loops
    assert {c.devices for c in found.values()} == {4}
    assert found["all-gather"].count % 6 == 0
    assert found["all-gather"].bytes == found["all-gather"].count * layer / 4
    # The CPU reduces the whole gradients, where a TPU scatters them, too.
    assert found["all-reduce"].count == 6
    assert found["all-reduce"].bytes == 6 * layer


def test_a_program_that_cannot_be_printed_still_has_a_plan(monkeypatch):
    class Unprintable:
        def __init__(self, compiled):
            self.memory_analysis = compiled.memory_analysis

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure of the printer")

    compiled = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: Unprintable(compiled(self)))
    found = make_plan(registry.with_computation_chosen(tiny()), HERE, 10, 1437, 16)
    assert found.traffic is None
    assert found.memory.needed > 0
    assert found.fits
    [note] = found.notes
    assert "cannot print its program (INTERNAL: RET_CHECK" in note
    text = page.describe(found)
    assert note in text
    assert "exchange" not in text
    assert "no estimate" not in text


# --- FLOPs --------------------------------------------------------------------------------


def test_products_of_loops_branches_and_convolutions():
    def f(x, w, k):
        x = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x)
        image = x.reshape(2, 8, 8, 4)
        return jax.lax.conv_general_dilated(
            image, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    traced = jax.jit(f).trace(jnp.ones((32, 16)), jnp.ones((16, 16)), jnp.ones((3, 3, 4, 6)))
    product, convolution = 2 * 32 * 16 * 16, 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)
    assert product_flops(traced.jaxpr.jaxpr) == 6 * product + convolution


def test_products_written_for_one_device_and_for_one_block_count_as_often_as_they_run():
    mesh = sharding.make_mesh()
    split = PartitionSpec("data")
    of_one = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split
    )
    x = jnp.ones((mesh.size, 16)), jnp.ones((16, 32))
    assert product_flops(jax.jit(of_one).trace(*x).jaxpr.jaxpr) == 2 * mesh.size * 16 * 32

    kernel = functools.partial(tpu_attention.forward, interpret=True)
    traced = jax.jit(kernel).trace(*[jnp.ones((3, 20, 4, 8), jnp.bfloat16)] * 3)
    assert product_flops(traced.jaxpr.jaxpr) == 2 * 2 * 3 * 4 * 20 * 20 * 8


def test_both_gradients_of_a_strided_convolution_take_as_much_as_itself():
    # Without padding, which the count of the gradient of the image would include.
    def f(x, k):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, k, (2, 2), "VALID", dimension_numbers=dimensions
        ).sum()

    x, k = jnp.ones((2, 8, 8, 4)), jnp.ones((2, 2, 4, 6))
    traced = jax.jit(jax.value_and_grad(f, (0, 1))).trace(x, k)
    convolution = 2 * (2 * 4 * 4 * 6) * (2 * 2 * 4)
    assert product_flops(traced.jaxpr.jaxpr) == 3 * convolution


@pytest.mark.parametrize(
    ("variant", "smaller"),
    [("B/16", {}), ("Mixer-B/16", {"depth": 2})],
)
def test_the_count_in_the_program_is_that_of_the_shape(variant, smaller):
    config = configuration.get_config()
    configuration.set_duration(config, "total", epochs=300)
    config.model.update({"variant": variant, "remat": "none", **smaller})
    config = registry.with_computation_chosen(config)
    learning = build_learning(config, sharding.make_mesh(), 1000, 1_281_167)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    traced = learning.train_step.trace(learning.abstract_state, batch)
    expected = 8 * train_flops(registry.configure(config.model, (224, 224), 3, 1000))
    assert product_flops(traced.jaxpr.jaxpr) == pytest.approx(expected, rel=0.02)


# --- Roofline -----------------------------------------------------------------------------


def test_links_that_a_collective_can_use():
    v5e, v4 = CHIPS["TPU v5 lite"], CHIPS["TPU v4"]
    assert interconnect(v5e, (16, 16), 256) == 4 * 50e9  # two closed rings, both ways
    assert interconnect(v5e, (16, 16), 16) == 2 * 50e9
    assert interconnect(v5e, (4, 4), 16) == 2 * 50e9  # open: one link at each end
    assert interconnect(v4, (4, 4, 4), 64) == 6 * 50e9
    assert interconnect(v4, (), 1) == 50e9


def test_an_estimate_by_hand():
    found = roofline.estimate(
        CHIPS["TPU v5 lite"],
        (4, 4),
        model_flops=197e12 * 0.3,
        executed_flops=197e12 * 0.4,
        traffic=819e9 * 0.1,
        collectives=[Collective("all-gather", 16, 3, 10**9, 20e9, "bf16[2]")],
    )
    *seconds, mfu = dataclasses.astuple(found)
    assert seconds == pytest.approx([0.4, 0.1, 0.2, 0.4, 0.7])
    assert mfu == pytest.approx((0.3 / 0.7, 0.3 / 0.4))


# --- Search -------------------------------------------------------------------------------


def planned(size, used, limit=16 << 30, refusal=None):
    return Plan(
        variant="B/16", image_size=(224, 224), target="v5e:2x2", chip="v5e", devices=4,
        mesh={"data": 4, "fsdp": 1, "tensor": 1}, batch_size=4 * size, per_device_batch=size,
        remat="dots", scan=True, num_classes=1000, parameters=86_567_656, model_flops=100,
        counted_flops=99, executed_flops=110, limit=limit,
        memory=None if refusal else Memory(used, 0, 0, 0, 0), traffic=0, movers=(),
        collectives=(), estimate=None, notes=(), refusal=refusal, used=used,
        seconds={"compile": 1.0},
    )  # fmt: skip


def compiler(most, says=True):
    """Memory grows with the batch up to the limit, which is reached at `most` examples."""
    constant, limit = 2 << 30, 16 << 30

    def attempt(size):
        used = int(constant + (limit - constant) / most * size)
        refusal = "too much" if used > limit else None
        return planned(size, None if refusal and not says else used, refusal=refusal)

    return attempt


@pytest.mark.parametrize("most", [1, 3, 7, 8, 12, 16, 37, 100, 239, 1000])
@pytest.mark.parametrize("says", [True, False])
def test_the_search_finds_the_largest_batch(most, says):
    tried = largest(compiler(most + 0.5, says))
    found = best(tried).per_device_batch
    expected = most if most < 8 else most // 8 * 8
    assert found <= most
    assert expected - found < max(8, found // 16)
    # Two that are refused with a number predict the rest, of which each takes long.
    assert len(tried) <= (5 if says else 13)
    assert sum(plan.fits for plan in tried) <= (2 if says else 5)
    assert len({plan.per_device_batch for plan in tried}) == len(tried)


def test_the_search_surpasses_a_prediction_that_was_too_low():
    """Near the limit XLA recomputes by itself."""

    def attempt(size):
        used = min(1 + size, 15) << 30
        return planned(size, used if size <= 400 else 17 << 30)

    assert 376 <= best(largest(attempt)).per_device_batch <= 400


def test_a_search_may_be_of_some_policies_only():
    tried = search(lambda policy, size: compiler(100)(size), ["dots"])
    assert list(tried) == ["dots"]
    assert best(tried["dots"]).per_device_batch == 96


def test_the_search_ends_where_everything_or_nothing_fits():
    assert [p.per_device_batch for p in largest(compiler(9999))] == [4096]
    tried = largest(lambda size: planned(size, 17 << 30))
    assert tried[-1].per_device_batch == 1
    assert best(tried) is None
    assert "none fits" in page.search_table({"none": tried})


# --- Messages -----------------------------------------------------------------------------


def test_refusals_of_compilers_keep_their_numbers():
    text = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
        "memory required for HLO temporaries (77.01G) exceeds available HBM (15.75G)."
    )
    reason, used = refused(text)
    assert used == round(77.01 * (1 << 30))
    assert "77.01 GiB of the 15.75 GiB" in reason
    reason, used = refused("RESOURCE_EXHAUSTED: ... Used 512.5M of 1.00G hbm. Exceeded ...")
    assert used == round(512.5 * (1 << 20))
    assert refused("RESOURCE_EXHAUSTED: no idea")[1] is None
    with pytest.raises(UserError, match="refuses the step: INTERNAL: a bug"):
        refused("INTERNAL: a bug\nand its trace")


def test_verdicts():
    assert planned(8, 3 << 30).verdict() == (
        "fits: B/16 with 8 examples a device needs 3.00 GiB of 16.00 GiB on v5e:2x2"
    )
    over = planned(8, 17 << 30)
    assert not over.fits
    assert over.verdict().startswith(
        "does not fit: B/16 with 8 examples a device on v5e:2x2: it needs 17.00 GiB of 16.00"
    )
    refusal = planned(8, 77 << 30, refusal="the compiler needs much")
    assert not refusal.fits
    assert "the compiler needs much; use a smaller --per_device_batch" in refusal.verdict()
    assert planned(8, 3 << 30, limit=None).verdict().startswith("compiles: ")


def test_data_that_is_not_opened():
    assert data_sets.data_of("tfds:imagenet21k", None, None) == (21_843, 14_197_122, None)
    assert data_sets.data_of("tfds:imagenet21k", 5, None) == (5, 14_197_122, None)
    classes, examples, note = data_sets.data_of("folder:~/pets", 37, None)
    assert (classes, examples) == (37, 1_281_167)
    assert "folder:~/pets is not opened; taken to have 37 classes and 1,281,167" in note
    assert data_sets.data_of("folder:~/pets", 37, 100) == (37, 100, None)


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"v5e:2x2 needs .* pip install 'vit_jax\[tpu\]'"):
        topology("v5e:2x2")


# --- The real step ------------------------------------------------------------------------


def chosen():
    config = tiny()
    config.data.mixup = 0.0  # whose random numbers take loops of unknown length
    config.model.dropout = config.model.stochastic_depth = 0.0  # quicker to compile
    config.mesh.data, config.mesh.fsdp = 2, 2
    return registry.with_computation_chosen(config)


def test_a_plan_of_the_real_step_on_four_devices():
    config = chosen()
    found = make_plan(config, HERE, 10, 1437, 32)
    assert found.notes == ()
    assert (found.batch_size, found.per_device_batch, found.devices) == (32, 8, 4)
    mesh = sharding.make_mesh(config.mesh, FOUR)
    learning = build_learning(config, mesh, 10, 1437)
    state = learning.abstract_state
    assert found.parameters == sum(x.size for x in jax.tree.leaves(state.params))
    images, labels = 8 * 8 * 8, 8 * 4
    divided = sharding.bytes_per_device(state, mesh)
    assert found.memory.arguments == divided + images + labels
    assert found.memory.aliases == divided
    assert found.memory.needed > divided
    assert found.executed_flops > found.counted_flops  # dots: attention's products again
    assert found.counted_flops == pytest.approx(found.model_flops, rel=0.1)  # a tiny image
    assert {c.kind for c in found.collectives} >= {"all-gather", "all-reduce"}
    assert found.fits
    assert found.estimate is None  # nobody knows what this processor can do
    text = page.describe(found)
    assert "data 2 x fsdp 2 x tensor 1" in text
    assert text.splitlines()[-1] == found.verdict()
    assert json.loads(json.dumps(page.to_json(found)))["memory"]["aliases"] == divided


def test_a_mesh_that_does_not_divide_the_network_is_told():
    config = chosen()
    config.model.width, config.model.mlp_dim = 42, 81
    config.mesh.data, config.mesh.fsdp = 1, 4
    mesh = sharding.make_mesh(config.mesh, FOUR)
    state = build_learning(config, mesh, 10, 1437).abstract_state
    [note] = undivided(state, mesh)
    assert "config.mesh.fsdp=4 or config.mesh.tensor=1 does not divide" in note
    assert f"takes {gib(sharding.bytes_per_device(state, mesh))} on a device" in note


def test_a_batch_that_the_devices_do_not_divide():
    with pytest.raises(UserError, match="the batch is 6, which 4 devices"):
        make_plan(chosen(), HERE, 10, 1437, 6)


def test_a_device_with_too_little_memory():
    little = Target("a small device", FOUR, CHIPS["TPU v5 lite"], (2, 2), 1000)
    found = make_plan(chosen(), little, 10, 1437, 32)
    assert not found.fits
    assert found.estimate.mfu[0] < found.estimate.mfu[1]
    assert "does not fit: mu/4 with 8 examples a device on a small device" in found.verdict()


# --- The command --------------------------------------------------------------------------


def plan(*arguments, how=run):
    plain = ("--config.data.mixup=0", "--config.model.stochastic_depth=0")
    return how("plan", f"--config={TINY}", *plain, *arguments)


def test_the_command_plans_for_this_machine(tmp_path):
    output = tmp_path / "plan.json"
    result = plan("--per_device_batch=4", f"--output={output}")
    assert result.returncode == 0, result.stderr
    assert "compiling" in result.stderr.splitlines()[-1]  # said before it is done
    stored = json.loads(output.read_text())
    assert stored["fits"]
    assert stored["movers"]
    assert stored["batch_size"] == stored["per_device_batch"] == 4
    assert result.stdout.splitlines()[-1] == stored["verdict"]
    assert "no estimate of time" in result.stdout


def test_a_search_without_a_limit_and_a_mesh_that_does_not_fit():
    assert_one_sentence(
        plan("--search", how=call), "--search needs devices whose memory is known"
    )
    assert_one_sentence(
        plan("--config.mesh.fsdp=3", how=call), "config.mesh is data=-1, fsdp=3, tensor=1"
    )


needs_libtpu = pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install 'vit_jax[tpu]'")


@needs_libtpu
def test_tpus_that_are_not_there(tmp_path):
    output = tmp_path / "plan.json"
    small = ("--topology=v5e:2x2", "--config.mesh.fsdp=4", f"--output={output}")
    result = plan(*small, "--per_device_batch=16", "--config.model.dtype=bfloat16")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"compiling .*\n", result.stderr)  # libtpu says nothing
    stored = json.loads(output.read_text())
    assert (stored["chip"], stored["devices"], stored["batch_size"]) == ("v5e", 4, 64)
    assert 0 < stored["memory"]["arguments"] < stored["limit"]
    assert 0 < stored["estimate"]["mfu"][0] < stored["estimate"]["mfu"][1] < 1
    assert sum(c["sent"] for c in stored["collectives"]) > 0
    assert "MFU" in result.stdout


@needs_libtpu
def test_a_batch_that_no_tpu_holds():
    result = plan("--topology=v5e:2x2", "--per_device_batch=16777216")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stdout.splitlines()[-1].startswith("does not fit: mu/4 with 16777216 ")


@needs_libtpu
def test_a_slice_that_does_not_exist():
    assert_one_sentence(plan("--topology=v5e:3x5"), "--topology=v5e:3x5", "such as v5e:4x4")


@needs_libtpu
def test_the_optimizer_passes_once_over_each_array_on_a_tpu():
    config = configuration.get_config().optimizer
    config.update({"weight_decay": 0.1, "clip_norm": 1.0})
    optimizer = make_optimizer(config, optax.constant_schedule(1e-3))
    mesh = sharding.make_mesh(devices=topology("v5e:2x2").devices[:1])

    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    placed = lambda tree: jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)
        ),
        tree,
    )
    params = placed({"kernel": jax.ShapeDtypeStruct((2048, 1024), jnp.float32)})
    state = placed(jax.eval_shape(optimizer.init, params))
    program = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    results = re.findall(r" = (\S.*?) fusion\(", program.as_text())
    made = [len(re.findall(r"f32\[2048,1024\]", shapes)) for shapes in results]
    # One loop makes the weights and both moments; the norm for clipping is a scalar.
    assert [count for count in made if count] == [3]
