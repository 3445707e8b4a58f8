"""Memory traffic of attention on unattached TPUs: `python -m benchmarks.tpu_attention`.

Compiles softmax attention and its gradient (pip install -e '.[tpu]') for several numbers of
tokens, as one chip computes it, in every implementation:

  whole    XLA's products of all examples at once
  parts    XLA's products, in parts small enough that the scores stay on the chip
  pallas   our kernel for short sequences
  flash    JAX's kernel `pallas.ops.tpu.flash_attention`
  splash   JAX's kernel `pallas.ops.tpu.splash_attention`

JAX's kernels take tokens in multiples of 128 only, so these are padded and masked. Nothing is
executed. Of a kernel the operands and results count once; flash and splash read keys and values
again for each block of queries, which is added.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import conditions, report
from benchmarks.measure import save
from vit_jax.command_line import cli
from vit_jax.distributed import sharding
from vit_jax.models import devices
from vit_jax.models.attention_gradient import recomputing_attention
from vit_jax.models.attention_kernels import splash_attention
from vit_jax.planning.program import Program
from vit_jax.planning.step import memory_of
from vit_jax.planning.target import topology
from vit_jax.system.errors import UserError

HEADS, WIDTH = 16, 64  # of L/16
TOKENS = 16_384  # on a chip at most: more than fit into its fast memory
LANES = 128
LARGEST_BLOCK = 512  # of JAX's kernels: tokens at once

Form = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def ours(form: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return recomputing_attention(q, k, v, None, form)


def examples(tokens: int) -> int:
    """On a chip: a power of two."""
    return 1 << max(0, (TOKENS // tokens).bit_length() - 1)


def padded(tokens: int) -> int:
    return -(-tokens // LANES) * LANES


def block(tokens: int) -> int:
    """The largest block that divides the padded tokens."""
    rows = padded(tokens) // LANES
    return LANES * max(n for n in range(1, LARGEST_BLOCK // LANES + 1) if rows % n == 0)


def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as stock

    tokens, n = q.shape[1], block(q.shape[1])
    more = ((0, 0), (0, 0), (0, padded(tokens) - tokens), (0, 0))
    sizes = stock.BlockSizes(n, n, n, 1, n, n, n, n, n, n, n)

    def on_one(*qkv: jax.Array) -> tuple[jax.Array]:
        padding = (jnp.arange(padded(tokens)) >= tokens).astype(jnp.int32)
        ids = jnp.broadcast_to(padding, (len(qkv[0]), len(padding)))
        y = stock.flash_attention(
            *(jnp.pad(x.swapaxes(1, 2), more) for x in qkv),
            segment_ids=stock.SegmentIds(ids, ids),
            sm_scale=WIDTH**-0.5,
            block_sizes=sizes,
        )
        return (y[:, :, :tokens].swapaxes(1, 2),)

    given = [(x, devices.TOKENS) for x in (q, k, v)]
    return devices.on_each_device(on_one, given, [devices.TOKENS])[0]


def splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return splash_attention(q, k, v, "bfloat16")


FORMS: dict[str, Form] = {
    "whole": functools.partial(ours, "whole"),
    "parts": functools.partial(ours, "parts"),
    "pallas": functools.partial(ours, "pallas"),
    "flash": flash,
    "splash": splash,
}


def read_again(form: str, tokens: int) -> int:
    """Bytes of keys and values that flash and splash read for each block but the first.

    Forward and in each pass backward, of which flash has two and splash one, over the other
    axis.
    """
    if form not in ("flash", "splash"):
        return 0
    operand = examples(tokens) * HEADS * padded(tokens) * LANES * 2  # 64 numbers fill 128 lanes
    passes = 3 if form == "flash" else 2
    return passes * 2 * operand * (padded(tokens) // block(tokens) - 1)


def measure(form: str, tokens: int, name: str) -> dict[str, Any]:
    """What one chip moves for the result and the three gradients of it."""
    mesh = sharding.make_mesh(devices=topology(name).devices)
    shape = (examples(tokens) * mesh.size, tokens, HEADS, WIDTH)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.split_batch(mesh))

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        y, back = jax.vjp(FORMS[form], q, k, v)
        return y, back(g)

    row: dict[str, Any] = {"form": form, "tokens": tokens, "topology": name}
    step = jax.jit(sharding.seeing(mesh, both), out_shardings=sharding.split_batch(mesh))
    try:
        compiled = step.lower(x, x, x, x).compile()
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return row | {"refusal": str(error).strip().splitlines()[0][:160]}
    once = Program(compiled.as_text()).traffic()
    again = read_again(form, tokens)
    return row | {
        "megabytes": (once + again) / examples(tokens) / 1e6,
        "memory": memory_of(compiled).needed,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """MB an example, a line for each form and a column for each number of tokens."""
    columns = sorted({row["tokens"] for row in rows})
    lines = ["| form | " + " | ".join(f"{n:,} tokens" for n in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for form in dict.fromkeys(row["form"] for row in rows):
        found = {row["tokens"]: row for row in rows if row["form"] == form}
        cells = [
            f"{found[n]['megabytes']:.1f}" if "megabytes" in found.get(n, {}) else "refused"
            for n in columns
        ]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


MARK = "<!-- tpu_attention -->"  # in a page, before and after the table


def define_flags() -> None:
    flags.DEFINE_string("topology", "v5e:2x2", "A slice of TPUs; each chip does the same.")
    flags.DEFINE_list("tokens", ["197", "577", "785", "1370", "4097"], "Numbers of tokens.")
    flags.DEFINE_list("forms", list(FORMS), "Forms of attention.")
    flags.DEFINE_string("output", "docs/planning/tpu_attention.json", "The file to write.")
    flags.DEFINE_string("page", None, "A page of Markdown to put the table into.")


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    given = flags.FLAGS
    if unknown := [form for form in given.forms if form not in FORMS]:
        raise UserError(f"--forms has {unknown[0]!r}: use some of {', '.join(FORMS)}")
    if wrong := [n for n in given.tokens if not n.isdigit() or n == "0"]:
        raise UserError(f"--tokens has {wrong[0]!r}: use whole numbers from 1")
    rows: list[dict[str, Any]] = []
    found = conditions.look(conditions.limit_threads(None))
    record = {"benchmark": "tpu_attention", "conditions": found, "results": rows}
    for tokens in map(int, given.tokens):
        for form in given.forms:
            rows.append(measure(form, tokens, given.topology))
            save(Path(given.output), record)
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if given.page:
        report.fill(Path(given.page), table(rows), MARK)


if __name__ == "__main__":
    cli.run(main, define_flags)
