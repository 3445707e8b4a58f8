"""A plan as readable text and as JSON."""

import dataclasses
from typing import Any

from vit_jax.planning import roofline
from vit_jax.planning.program import Collective
from vit_jax.planning.roofline import Roofline
from vit_jax.planning.search import best
from vit_jax.planning.step import Plan, gib


def _range(shares: tuple[float, float]) -> str:
    return f"{shares[0]:.0%} to {shares[1]:.0%}"


def describe(plan: Plan) -> str:
    """The plan as text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    height, width = plan.image_size
    scanned = "a loop over layers" if plan.scan else "layers one after another"
    per_step = lambda flops: f"{flops / 1e12:,.1f} TFLOP"
    agree = plan.counted_flops / plan.model_flops - 1
    again = plan.executed_flops / plan.counted_flops - 1
    lines = [
        f"model        {plan.variant} at {height}x{width}, {plan.parameters:,} parameters, "
        f"{plan.num_classes:,} classes; {scanned}, remat {plan.remat}",
        f"devices      {plan.devices} of {plan.target}: {mesh}",
        f"batch        {plan.batch_size:,}, {plan.per_device_batch:,} a device",
        f"FLOPs        {per_step(plan.model_flops)} a step by the network's shape; "
        f"{per_step(plan.counted_flops)} in the program ({agree:+.1%}), and {again:.1%} more "
        f"recomputed",
    ]
    if plan.memory:
        memory = dataclasses.asdict(plan.memory)
        lines.append("memory a device")
        lines += [f"  {name:11}{gib(size):>12}" for name, size in memory.items()]
        of = f" of {gib(plan.limit)}" if plan.limit else ""
        lines.append(f"  {'needed':11}{gib(plan.memory.needed):>12}{of}")
    if plan.traffic is not None:
        lines += _describe_movers(plan)
        lines += _describe_collectives(plan.collectives)
    if plan.estimate:
        lines += _describe_estimate(plan.estimate)
    elif plan.traffic is not None:
        lines.append("no estimate of time: nothing is known here of what these devices can do")
    lines += [f"note: {note}" for note in plan.notes]
    took = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in plan.seconds.items())
    return "\n".join([*lines, f"took         {took}", plan.verdict()])


def _describe_movers(plan: Plan) -> list[str]:
    """The largest movers of bytes: where a change would help most."""
    if not plan.traffic:
        return []
    gigabytes = lambda size: f"{size / 1e9:.2f} GB"
    line = "  {:>9}  {:10}  {:44}  {:22}  {}".format
    shown = sum(mover.bytes for mover in plan.movers)
    return [
        f"traffic      {gigabytes(plan.traffic)} to and from HBM, a step and device; the "
        f"largest movers, {shown / plan.traffic:.0%} of it",
        line("", "phase", "part of the network", "operation", "largest result"),
    ] + [
        line(gigabytes(m.bytes), m.phase, m.part[-44:], m.operation[:22], m.largest)
        for m in plan.movers
    ]


def _describe_collectives(collectives: tuple[Collective, ...]) -> list[str]:
    if not collectives:
        return ["exchange     none"]
    line = "  {:<20}{:>8}{:>8}{:>14}{:>14}  {}".format
    head = line("", "devices", "count", "given", "sent", "largest result")
    return ["exchange, a step and device", head] + [
        line(c.kind, c.devices, c.count, gib(c.bytes), gib(c.sent), c.largest)
        for c in collectives
    ]


def _describe_estimate(estimate: Roofline) -> list[str]:
    ms = lambda seconds: f"{1e3 * seconds:.1f} ms"
    return [
        f"time         {ms(estimate.shortest)} to {ms(estimate.longest)} a step: compute "
        f"{ms(estimate.compute)}, memory {ms(estimate.memory)}, exchange "
        f"{ms(estimate.collectives)}",
        f"MFU          {_range(estimate.mfu)}, an estimate, where",
        *(f"  - {assumption}" for assumption in roofline.ASSUMPTIONS),
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """All of a plan, for JSON."""
    return {**dataclasses.asdict(plan), "fits": plan.fits, "verdict": plan.verdict()}


def attempt_line(plan: Plan) -> str:
    """A line of progress for each attempt of a search."""
    used = gib(plan.used) if plan.used else "?"
    return (
        f"remat {plan.remat:5} {plan.per_device_batch:5} a device: {used:>10}, "
        f"{'fits' if plan.fits else 'does not fit'} ({plan.seconds['compile']:.0f} s)"
    )


def search_table(found: dict[str, list[Plan]]) -> str:
    """A line for each policy."""
    line = "{:<8} {:>16} {:>11} {:>14} {:>12} {:>16}".format
    lines = [line("remat", "batch a device", "batch", "memory", "recomputed", "MFU estimate")]
    for policy, tried in found.items():
        plan = best(tried)
        if plan is None:
            lines.append(line(policy, "none fits", "", "", "", ""))
            continue
        again = plan.executed_flops / plan.counted_flops - 1
        mfu = _range(plan.estimate.mfu) if plan.estimate else "-"
        sizes = f"{plan.per_device_batch:,}", f"{plan.batch_size:,}", gib(plan.used or 0)
        lines.append(line(policy, *sizes, f"{again:.0%}", mfu))
    return "\n".join(lines)
