"""Published weights of any family, recognised by what is in the file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from vit_jax.interop import (
    google,
    huggingface,
    timm,
    timm_hybrid,
    torchvision,
    weight_files,
    wrappers,
)
from vit_jax.interop.families import FAMILIES, Imported
from vit_jax.system.errors import UserError

__all__ = ["Imported", "load_weights"]


def load_weights(
    path: Path,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    *,
    family: str | None = None,
    pool: str | None = None,
    weights: str | None = None,
) -> Imported:
    """Reads weights of another project.

    Arguments have precedence over the file, and the file over assumptions.

    Args:
      path: an `.npz`, `.safetensors` or PyTorch file, or a folder with a `config.json`. Names
        decide nothing; a `config.json` beside a file is used.
      image_size: (height, width) that position embeddings, or the token mixing of a Mixer,
        were made for; needed where that is not a square and nothing in the file says so.
      num_heads: where the file does not say it and its width does not give it away.
      family: a name of `FAMILIES`: whose code trained them.
      pool: how tokens become one vector, of `vit_config.CHOICES`.
      weights: `raw` | `ema`, where a file has both.

    Raises:
      UserError: the file cannot be read, is none of our models, or is one that our model
        cannot hold exactly.
    """
    path = Path(path)
    for flag, value, choices in (("family", family, FAMILIES), ("pool", pool, timm.POOLS)):
        if value is not None and value not in choices:
            raise UserError(f"--{flag}={value}: use one of {', '.join(choices)}")
    config = huggingface.config_beside(path)
    if path.is_dir():
        arrays, origin = huggingface.read_folder(path)
    else:
        arrays, origin = weight_files.read_nested(path)
    if google.recognises(arrays):
        if weights is not None:
            raise UserError(f"{path} holds one set of weights: leave out --weights={weights}")
        weight_files.check_finite(arrays, path)
        size = image_size or _pair(weight_files.npz_comment(path).get("image_size"))
        found = google.read(arrays, path, size, family, pool)
    else:
        chosen = wrappers.choose(arrays, weights, path)
        weight_files.check_finite(chosen.arrays, path)
        found = _read(chosen, path, config, origin, image_size, num_heads, family, pool)
        found = dataclasses.replace(found, notes=(*chosen.notes, *found.notes))
    said: dict[str, Any] = {"num_heads": num_heads, "pool": pool, "family": family}
    said["source_image_size"] = image_size
    _check_taken(found, said, path)
    return found


def _check_taken(found: Imported, said: dict[str, Any], path: Path) -> None:
    """Refuses flags that contradict the arrays.

    Raises:
      UserError: naming the flag and what the file has.
    """
    has = {**vars(found.cfg), "family": found.family, "source_image_size": found.cfg.image_size}
    for flag, value in said.items():
        if value is not None and has.get(flag) != value:
            value = "x".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(
                f"--{flag}={value} is wrong: {path} has {flag} {has.get(flag, 'of no kind')}"
            )


def _read(
    chosen: wrappers.Chosen,
    path: Path,
    config: dict[str, Any] | None,
    origin: str,
    image_size: tuple[int, int] | None,
    num_heads: int | None,
    family: str | None,
    pool: str | None,
) -> Imported:
    arrays, notes = chosen.arrays, list[str]()
    if huggingface.recognises(arrays):
        return huggingface.read(arrays, path, config, image_size, num_heads, family, pool)
    if timm_hybrid.recognises_mixer(arrays):
        return timm_hybrid.read_mixer(arrays, path, config, image_size)
    if timm_hybrid.recognises(arrays):  # before those that it is built on
        return timm_hybrid.read(arrays, path, config, image_size, num_heads, pool)
    if other := torchvision.recognises(arrays):
        arrays = torchvision.to_timm(arrays, other, path, notes)
        family = family or other
        notes.append(
            f"The file does not say how images are prepared: what {family} does for most of "
            f"its models is assumed; --family=NAME sets another."
        )
    if timm.recognises(arrays):
        said, images = _said(path, origin), dict[str, Any]()
        if family is None:
            images = {name: said[name] for name in timm.IMAGES if name in said}
            family = images.pop("family", "timm" if images else None)
        said = {name: said[name] for name in timm.SAID if name in said}
        size, heads = said.pop("image_size", None), said.pop("num_heads", None)
        size, heads = image_size or size, num_heads or heads
        if pool:
            said = {k: v for k, v in said.items() if k not in ("pool", "class_token")}
        found = timm.read(
            arrays, path, config, origin, size, heads, family, pool, chosen.prefix
        )
        cfg = dataclasses.replace(found.cfg, **said)
        if len(images.get("class_names", ())) not in (0, cfg.num_classes):
            raise UserError(
                f"{path} has a header that does not fit its {cfg.num_classes} outputs"
            )
        return dataclasses.replace(found, cfg=cfg, notes=(*notes, *found.notes), **images)
    names = ", ".join(sorted(arrays)[:4])
    raise UserError(
        f"{path} has no Vision Transformer of a known family: it holds {len(arrays)} arrays "
        f"such as {names}"
    )


def _said(path: Path, origin: str) -> dict[str, Any]:
    """What a file that `timm.write` wrote says about the network, beside its arrays."""
    if origin != "safetensors" or path.is_dir():
        return {}
    try:
        said = json.loads(weight_files.safetensors_metadata(path).get("vit_jax", "{}"))
        said = {name: said[name] for name in (*timm.SAID, *timm.IMAGES) if name in said}
        for name in ("image_size", "input_size"):
            if name in said:
                height, width = said[name]
                said[name] = (int(height), int(width))
        if "class_names" in said:
            said["class_names"] = tuple(map(str, said["class_names"]))
        for name in ("value_range", "eval_transform", "posemb_resize", "family"):
            if not isinstance(said.get(name, ""), str):
                raise ValueError(f"{name} is {said[name]!r}")
        if said.get("family", "timm") not in FAMILIES:
            raise ValueError(f"there is no family {said['family']!r}")
        return said
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} has a header that vit_jax did not write: {error}") from error


def _pair(value: Any) -> tuple[int, int] | None:
    match value:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None
