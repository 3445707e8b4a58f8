"""Checks that the configurations of all networks share: each names a `config.model` field."""

from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax.system.errors import UserError


def check_choices(cfg: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    for field, allowed in choices.items():
        if (value := getattr(cfg, field)) not in allowed:
            raise UserError(f"model.{field} is {value!r}: use one of {', '.join(allowed)}")


def check_positive(cfg: Any, fields: Iterable[str]) -> None:
    for field in fields:
        value = getattr(cfg, field)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"model.{field} is {value}: it must be at least 1")


def check_rates(cfg: Any, fields: Iterable[str]) -> None:
    for field in fields:
        value = getattr(cfg, field)
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise UserError(f"model.{field} is {value}: use a rate of at least 0, below 1")


def check_tiles(image_size: tuple[int, int], patch_size: int) -> None:
    if any(size % patch_size or size < 1 for size in image_size):
        raise UserError(
            f"image_size is {image_size}, which patches of {patch_size} pixels do not tile: "
            f"use multiples of {patch_size}"
        )
