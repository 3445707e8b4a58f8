"""How PyTorch stores what we store: other names, and matrices as (out, in).

A `Layout` is a table of names; shapes follow from ours. Everything that is read through one is
compared with what the model needs: whatever is missing, unknown or misshapen is reported.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from vit_jax.interop.families import (
    Arrays,
    check_arrays,
    expected_shapes,
    flatten,
    learned_positions,
    nest,
)
from vit_jax.models.model import Params
from vit_jax.models.registry import ModelConfig
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

POSITIONS = "Transformer/posembed_input/pos_embedding"
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class Layout(NamedTuple):
    """Their names for our modules and parameters.

    Attributes:
      block: the prefix of layer `i`.
      names: ours to theirs; `attn.qkv[key]` is the part `key` of a matrix `attn.qkv`.
      joined: the parts of such matrices, which are stacked along the first axis.
    """

    block: str
    names: dict[str, str]
    joined: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def parts(self, module: str) -> tuple[str, ...]:
        """What the matrix of `blocks.0.attn.qkv` is stacked from; () if it is one of ours."""
        endings = (end for end in self.joined if f".{module}".endswith(f".{end}"))
        return next((self.joined[end] for end in endings), ())

    def name(self, ours: str) -> str:
        """`Transformer/encoder_norm/scale` -> `norm.weight`."""
        prefix = ""
        if match := re.match(r"Transformer/encoderblock_(\d+)/", ours):
            prefix, ours = self.block.format(i=match[1]), ours[match.end() :]
        if ours in self.names:
            return prefix + self.names[ours]
        module, _, leaf = ours.rpartition("/")
        return f"{prefix}{self.names[module]}.{_LEAVES[leaf]}"


def split(state: Arrays, layout: Layout, source: Path) -> Arrays:
    """`blocks.0.attn.qkv.weight` -> `blocks.0.attn.qkv[query].weight` and so on.

    Raises:
      UserError: a part is there by itself, too.
    """
    out: Arrays = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        parts = layout.parts(module)
        if not parts or not value.ndim or len(value) % len(parts):
            out[name] = value  # if it should have been split, the check will name it
            continue
        for part, x in zip(parts, np.split(value, len(parts)), strict=True):
            if (new := f"{module}[{part}].{leaf}") in state:
                raise UserError(f"{source} has {part} of {name!r} twice, joined and apart")
            out[new] = x
    return out


def join(state: Arrays, layout: Layout) -> Arrays:
    """The inverse of `split`; parts without all of their siblings stay as they are."""
    out = dict(state)
    for name in state:
        joined = re.sub(r"\[\w+\]", "", name)
        module, _, leaf = joined.rpartition(".")
        parts = layout.parts(module)
        siblings = [f"{module}[{part}].{leaf}" for part in parts]
        if joined != name and all(sibling in out for sibling in siblings):
            out[joined] = np.concatenate([out.pop(sibling) for sibling in siblings])
    return out


def to_torch(ours: str, value: np.ndarray) -> np.ndarray:
    """A parameter named `ours` in PyTorch's layout."""
    if ours == "embedding/kernel":
        return value.transpose(3, 2, 0, 1)
    if ours.endswith("/kernel"):
        inputs = 2 if ours.endswith("/out/kernel") else 1
        return value.reshape(math.prod(value.shape[:inputs]), -1).T
    return value.reshape(-1) if ours.endswith("/bias") else value


def from_torch(ours: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_torch`, in float32."""
    if ours == "embedding/kernel":
        value = value.transpose(2, 3, 1, 0)
    elif ours.endswith("/kernel"):
        value = value.T
    return np.ascontiguousarray(value.reshape(shape), np.float32)


def convert(state: Arrays, cfg: ViTConfig, layout: Layout, source: Path) -> Params:
    """Our parameters from their `state`.

    Raises:
      UserError: listing all arrays that are missing, unknown or misshapen.
    """
    shapes = expected_shapes(cfg)
    # Zeros that take no memory: what shape would each parameter have there?
    blank = {ours: np.broadcast_to(np.float32(0), shape) for ours, shape in shapes.items()}
    wanted = {layout.name(ours): to_torch(ours, x).shape for ours, x in blank.items()}
    check_arrays(state, wanted, source)
    return nest(
        {ours: from_torch(ours, state[layout.name(ours)], s) for ours, s in shapes.items()}
    )


def refuse(names: Iterable[str], reasons: dict[str, str], source: Path) -> None:
    """Raises UserError with the first of `reasons` whose pattern is found in a name."""
    names = list(names)
    for pattern, reason in reasons.items():
        if any(re.search(pattern, name) for name in names):
            raise UserError(f"{source} cannot be held exactly by our model: {reason}")


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """How many different layers the names have; `pattern` captures the number of one."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def require_plain(cfg: ModelConfig, path: Path) -> None:
    """Raises UserError unless `cfg` is a Vision Transformer without a ResNet in front."""
    if not isinstance(cfg, ViTConfig) or cfg.resnet is not None:
        raise UserError(
            f"cannot write {path}: this layout is for plain Vision Transformers, write an .npz"
        )


def export(cfg: ViTConfig, params: Params, source: Path) -> Arrays:
    """Parameters by our names, position embeddings of any kind as one learned table.

    Raises:
      UserError: they are not those of `cfg`, or it has positions that only we have.
    """
    if cfg.posemb_at != "stem" or cfg.relative == "keys":
        raise UserError(
            f"{source} cannot be written: no other layout has positions as "
            f"model.posemb_at={cfg.posemb_at!r} and model.relative={cfg.relative!r} do"
        )
    arrays = {name: np.asarray(value) for name, value in flatten(params).items()}
    check_arrays(arrays, expected_shapes(cfg), source)
    arrays = {name: x for name, x in arrays.items() if "/posembed_input/" not in name}
    return arrays | {POSITIONS: learned_positions(cfg, params)}
