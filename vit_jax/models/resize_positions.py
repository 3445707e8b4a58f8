"""Resizes position embeddings to another grid of patches, by the method of each family.

"Interpolate the position embeddings" (arXiv 2010.11929, section 3.2) means different things
in different code bases, and the differences are not small (up to 0.5 rms on unit-normal
tables when shrinking). So each method has a name:

  corner             bilinear between corners: Google, `scipy.ndimage.zoom(order=1)`
  half_pixel         bilinear between pixel centres: timm, when it reads Google's files
  bicubic            a = -0.75, centres, no antialias: DeiT, MAE, Hugging Face
  bicubic_antialias  a = -0.5, centres, antialias: timm otherwise, DINOv2 with registers
  bicubic_corner     a = -0.75, between corners: torchvision
  bicubic_dino       `bicubic` with DINO's and DINOv2's scale of (new + 0.1) / old
  geometric_cubic    BEiT's relative positions: cubic splines through points whose distance
                     grows outwards as a geometric series, so that near offsets keep theirs
  geometric          the same points, joined by straight lines: what timm does

Each is a linear map of rows and one of columns, so a resize is two small matrix products: in
float64, and inside a program, where gradients pass through it, in float32.
Grids are (rows, columns); what decides whether to resize is the grid, not the number
of tokens: 14 x 14 and 7 x 28 are both 196.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

Grid = tuple[int, int]
Array = TypeVar("Array", np.ndarray, jax.Array)


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _keys(a: float) -> Callable[[np.ndarray], np.ndarray]:
    """Keys' cubic convolution kernel; `a` is its slope at 1."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return kernel


def _clamped(
    centres: np.ndarray, old: int, kernel: Callable[[np.ndarray], np.ndarray], reach: int
) -> np.ndarray:
    """(new, old) weights; what reaches over the border is taken from the border."""
    weights = np.zeros((len(centres), old))
    for offset in range(1 - reach, reach + 1):
        index = np.floor(centres).astype(int) + offset
        np.add.at(
            weights,
            (np.arange(len(centres)), index.clip(0, old - 1)),
            kernel(centres - index),
        )
    return weights


def _corner(old: int, new: int) -> np.ndarray:
    return _clamped(np.linspace(0, old - 1, new), old, _triangle, 1)


def _half_pixel_centres(old: int, new: int, offset: float = 0.0) -> np.ndarray:
    return (np.arange(new) + 0.5) * old / (new + offset) - 0.5


def _half_pixel(old: int, new: int) -> np.ndarray:
    return _clamped(_half_pixel_centres(old, new), old, _triangle, 1)


def _bicubic(old: int, new: int, offset: float = 0.0) -> np.ndarray:
    return _clamped(_half_pixel_centres(old, new, offset), old, _keys(-0.75), 2)


def _bicubic_corner(old: int, new: int) -> np.ndarray:
    return _clamped(np.linspace(0, old - 1, new), old, _keys(-0.75), 2)


def _bicubic_dino(old: int, new: int) -> np.ndarray:
    # DINO resizes only when the grid differs, and then with its odd scale on both axes.
    return _bicubic(old, new, 0.1)


def _bicubic_antialias(old: int, new: int) -> np.ndarray:
    """The kernel is as wide as a new pixel, and the border is left out and renormalised."""
    scale = max(old / new, 1.0)
    distance = np.arange(old) - _half_pixel_centres(old, new)[:, None]
    weights = _keys(-0.5)(distance / scale)
    return weights / weights.sum(axis=1, keepdims=True)


def _geometric_points(old: int, new: int) -> np.ndarray:
    """Where the `old` (odd) offsets lie among the `new` ones, symmetric about 0.

    Point i is 1 + q + ... + q^(i-1), with q such that the outermost is new // 2; q is found
    between 1.01 and 1.5, as in BEiT's code.
    """
    half = np.arange(old // 2)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (q**half).sum() > new // 2 else (q, high)
    points = np.cumsum(q**half)
    return np.concatenate([-points[::-1], [0.0], points])


def _geometric(old: int, new: int) -> np.ndarray:
    points, wanted = _geometric_points(old, new), np.arange(new) - new // 2
    return np.stack([np.interp(wanted, points, row) for row in np.eye(old)], axis=1)


def _geometric_cubic(old: int, new: int) -> np.ndarray:
    from scipy.interpolate import make_interp_spline  # a third of a second, for BEiT alone

    points, wanted = _geometric_points(old, new), np.arange(new) - new // 2
    spline = make_interp_spline(points, np.eye(old), k=min(3, old - 1))
    return spline(np.clip(wanted, points[0], points[-1]))


METHODS: dict[str, Callable[[int, int], np.ndarray]] = {
    "corner": _corner,
    "half_pixel": _half_pixel,
    "bicubic": _bicubic,
    "bicubic_antialias": _bicubic_antialias,
    "bicubic_corner": _bicubic_corner,
    "bicubic_dino": _bicubic_dino,
    "geometric": _geometric,
    "geometric_cubic": _geometric_cubic,
}


def resize_grid(table: Array, old: Grid, new: Grid, method: str = "corner") -> Array:
    """Resizes the rows of a (rows * columns, D) table from grid `old` to grid `new`.

    Raises:
      UserError: the method is unknown, or the table does not have `old` rows x columns.
    """
    if method not in METHODS:
        raise UserError(
            f"there is no way {method!r} to resize position embeddings: use one of "
            f"{', '.join(METHODS)}"
        )
    if table.shape[0] != old[0] * old[1]:
        raise UserError(
            f"position embeddings for {table.shape[0]} patches do not fill a grid of "
            f"{old[0]} x {old[1]}: check the image and patch size that they were made for"
        )
    if old == new:
        return table
    rows, columns = METHODS[method](old[0], new[0]), METHODS[method](old[1], new[1])
    grid: Any
    if isinstance(table, jax.core.Tracer):
        grid = table.astype(jnp.float32).reshape(*old, -1)
        product = functools.partial(jnp.einsum, precision="highest")
        rows, columns = rows.astype(np.float32), columns.astype(np.float32)
    else:
        grid = np.asarray(table, np.float64).reshape(*old, -1)
        product = functools.partial(np.einsum, optimize=True)
    resized = product("ai,bj,ijd->abd", rows, columns, grid)
    return resized.reshape(new[0] * new[1], -1).astype(table.dtype)


def resize_embedding(embedding: Array, old: Grid, new: Grid, method: str = "corner") -> Array:
    """Resizes a (1, tokens, D) array; rows before the patches (class token ...) stay."""
    first = embedding.shape[1] - old[0] * old[1]
    if first < 0:
        raise UserError(
            f"position embeddings of {embedding.shape[1]} tokens are fewer than a grid of "
            f"{old[0]} x {old[1]}: check the image and patch size that they were made for"
        )
    patches = resize_grid(embedding[0, first:], old, new, method)
    return _joined([embedding[:, :first], patches[None]], 1)


def resize_relative(table: Array, old: Grid, new: Grid, method: str) -> Array:
    """Resizes BEiT's (offsets + 3, heads) table; the last three rows, of the class token, stay.

    The offsets between two patches of a grid are a grid themselves, twice as large but one.
    """
    before, after = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (old, new))
    return _joined([resize_grid(table[:-3], before, after, method), table[-3:]], 0)


def _joined(parts: list[Any], axis: int) -> Any:
    join = jnp.concatenate if isinstance(parts[0], jax.core.Tracer) else np.concatenate
    return join(parts, axis=axis)


def resize_params(params: Any, old: ViTConfig, new: ViTConfig, method: str = "corner") -> Any:
    """Returns the parameters of model `old` with the positions of `new`.

    Learned tables are interpolated; sine-cosine ones are no parameters, and are computed for
    whatever grid the model has.

    Raises:
      UserError: the method is unknown, or positions of this kind cannot be resized.
    """
    if old.grid == new.grid:
        return params
    if old.relative == "keys":
        raise UserError(
            "model.relative='keys' counts positions in one dimension, which another grid "
            "numbers differently: train at the size that you need"
        )
    encoder = dict(params["Transformer"])
    if "posembed_input" in encoder:
        encoder["posembed_input"] = _resize_tables(encoder["posembed_input"], old, new, method)
    change = lambda block: _resize_block(block, old, new, method)
    for name, block in encoder.items():
        if name.startswith("encoderblock_"):
            encoder[name] = change(block)
        elif name == "encoderblock":  # all layers, stacked
            encoder[name] = jax.vmap(change)(block)
    return {**params, "Transformer": encoder}


def _resize_block(block: Any, old: ViTConfig, new: ViTConfig, method: str) -> Any:
    if "posembed_input" in block:
        tables = _resize_tables(block["posembed_input"], old, new, method)
        block = {**block, "posembed_input": tables}
    attention = block["MultiHeadDotProductAttention_0"]
    if "relative" in attention:
        table = resize_relative(attention["relative"]["table"], old.grid, new.grid, method)
        attention = {**attention, "relative": {"table": table}}
        block = {**block, "MultiHeadDotProductAttention_0": attention}
    return block


def _resize_tables(tables: Any, old: ViTConfig, new: ViTConfig, method: str) -> Any:
    """The arrays of one `PositionEmbedding`."""
    # BEiT's way is one for offsets; its absolute positions, where it has any, are bicubic.
    method = "bicubic" if method.startswith("geometric") else method
    tables = dict(tables)
    if "pos_embedding" in tables:
        table = resize_embedding(tables["pos_embedding"], old.grid, new.grid, method)
        return {"pos_embedding": table}
    for name, axis in (("pos_embedding_y", 0), ("pos_embedding_x", 1)):
        before, after = (old.grid[axis], 1), (new.grid[axis], 1)
        tables[name] = resize_grid(tables[name], before, after, method)
    return tables
