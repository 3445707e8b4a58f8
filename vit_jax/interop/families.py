"""Families of published weights, and the form in which every reader here returns them.

Two files with the same arrays can mean different networks: the GELU, the epsilon of the
LayerNorms, the scale of the pixels and the way to resize position embeddings are
defined by the code that trained them, not by the file. A *family* names that code.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from vit_jax.models import registry
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.model import Params
from vit_jax.models.positions import posemb_sincos_2d
from vit_jax.models.registry import ModelConfig
from vit_jax.models.resnet import ResNetConfig
from vit_jax.models.variants import VARIANTS
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
    """What a file of weights does not say about the network it belongs to.

    Attributes:
      gelu: `tanh` | `erf`.
      layer_norm_eps: epsilon of every LayerNorm.
      posemb_resize: a name of `models.resize_positions.METHODS`.
      value_range: for `data.value_ranges`.
      transform: how images are brought to size for evaluation, for
        `data.transforms.language`; where they are cropped, `SHORTER` stands for the shorter
        edge before the crop.
      crop: what share of that edge the crop keeps.
    """

    gelu: str
    layer_norm_eps: float
    posemb_resize: str
    value_range: str
    transform: str
    crop: float = 0.875  # 224 of 256

    def eval_transform(self, image_size: tuple[int, int]) -> str:
        """The transform for images of (height, width) `image_size`."""
        return self.transform.replace("SHORTER", str(int(max(image_size) / self.crop)))


_AREA = "resize_shorter(SHORTER, method='area', rounding='floor')|center_crop"
_BICUBIC = "resize_shorter(SHORTER, method='bicubic')|center_crop('even')"
_BILINEAR = _BICUBIC.replace("bicubic", "bilinear_antialias")

# Numerics and resizing are what the published code of each family does. Not verified against
# published files: that crops at other sizes than 224 keep the same share of the edge.
FAMILIES = {
    # Google's original checkpoints and AugReg (2106.10270).
    "google": Family("tanh", 1e-6, "corner", "inception", "resize"),
    # ImageNet evaluation: 256 -> 224; its transfer configurations go 448 -> 384 instead.
    "big_vision": Family("tanh", 1e-6, "corner", "inception", _AREA),
    # The models that came from Google: a crop of 0.9 at 224 pixels, 1.0 at 384.
    "timm": Family("erf", 1e-6, "bicubic_antialias", "inception", _BICUBIC, 0.9),
    # Defaults of the code; published folders bring a preprocessor_config.json of their own.
    "huggingface": Family(
        "erf", 1e-12, "bicubic", "inception", "resize(method='bilinear_antialias')"
    ),
    "deit": Family("erf", 1e-6, "bicubic", "imagenet", _BICUBIC),
    # Those trained on ImageNet-22k; 1k alone, and BEiT v2, have `imagenet` pixels.
    "beit": Family("erf", 1e-6, "geometric_cubic", "inception", _BICUBIC, 0.9),
    "dino": Family("erf", 1e-6, "bicubic_dino", "imagenet", _BICUBIC),
    # Without registers; with them it resizes by `bicubic_antialias`.
    "dinov2": Family("erf", 1e-6, "bicubic_dino", "imagenet", _BICUBIC),
    # Evaluated by a linear head on the fixed sine-cosine positions that it was trained with.
    "moco": Family("erf", 1e-6, "bicubic", "imagenet", _BILINEAR),
    # The first ImageNet-1k weights of each model but L/16, which has 242 pixels for 256.
    "torchvision": Family("erf", 1e-6, "bicubic_corner", "imagenet", _BILINEAR),
    "openclip": Family("erf", 1e-5, "bicubic_antialias", "openclip", _BICUBIC, 1.0),
    # Above 224 pixels MAE's fine-tuning resizes without a crop.
    "mae": Family("erf", 1e-6, "bicubic", "imagenet", _BICUBIC),
}


@dataclasses.dataclass(frozen=True)
class Imported:
    """Weights of another project as one of our models.

    Attributes:
      family: a name of `FAMILIES`.
      cfg: the network, in which every number comes from the file or its family.
      params: nested dicts of float32 numpy arrays, one `encoderblock_i` a layer.
      class_names: one name an output, if the file has them.
      value_range: for `data.value_ranges`.
      eval_transform: for `data.transforms.language.parse_transform`.
      posemb_resize: a name of `models.resize_positions.METHODS`.
      notes: sentences about what was left out or assumed.
      input_size: (H, W) of the images that `eval_transform` makes, where they are not those
        that the positions of `cfg` are for.
      unprepared: why images cannot be prepared as published, if so: what the file says.
      multi_label: whether an image may have several classes, each with a sigmoid of its own.
    """

    family: str
    cfg: ModelConfig
    params: Params
    class_names: tuple[str, ...] | None
    value_range: str
    eval_transform: str
    posemb_resize: str
    notes: tuple[str, ...]
    input_size: tuple[int, int] | None = None
    unprepared: str = ""
    multi_label: bool = False


def imported(
    family: str, cfg: ModelConfig, params: Params, notes: Iterable[str], **given: Any
) -> Imported:
    """An `Imported` with the preprocessing of its family, where `given` says nothing else."""
    preset = FAMILIES[family]
    fields: dict[str, Any] = {
        "class_names": None,
        "value_range": preset.value_range,
        "eval_transform": preset.eval_transform(cfg.image_size),
        "posemb_resize": preset.posemb_resize,
    }
    if family == "dinov2" and isinstance(cfg, ViTConfig) and cfg.registers:
        fields["posemb_resize"] = "bicubic_antialias"
    return Imported(family, cfg, params, notes=tuple(notes), **fields | given)


# ---- what the shapes say -------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def expected_shapes(cfg: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter of `cfg`, by names joined with `/`."""
    leaves = flatten(jax.eval_shape(registry.build(cfg).init, jax.random.key(0)))
    return {name: leaf.shape for name, leaf in leaves.items()}


def flatten(params: Params) -> dict[str, Any]:
    """`{"head": {"bias": b}}` -> `{"head/bias": b}`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def rename(arrays: Arrays, name: Callable[[str], str], source: Path) -> Arrays:
    """Gives every array the name `name(old)`.

    Raises:
      UserError: two arrays would have the same name.
    """
    renamed: Arrays = {}
    for old, value in arrays.items():
        if (new := name(old)) in renamed:
            raise UserError(f"{source} has array {old!r} twice, under two names")
        renamed[new] = value
    return renamed


def nest(arrays: Arrays) -> Params:
    """The inverse of `flatten`."""
    params: Params = {}
    for name, value in arrays.items():
        *parents, leaf = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return params


def axes(arrays: Arrays, name: str, rank: int, source: Path) -> tuple[int, ...]:
    """The shape of array `name`, which the rest is inferred from.

    Raises:
      UserError: it is missing, of another rank, or empty.
    """
    if name not in arrays:
        raise UserError(f"{source} has no array {name!r}, which every model of its kind has")
    shape = arrays[name].shape
    if len(shape) != rank or 0 in shape:
        raise UserError(f"{source}: array {name!r} has shape {shape}, not {rank} filled axes")
    return shape


_Config = TypeVar("_Config", ViTConfig, MixerConfig, ResNetConfig)


def configure(source: Path, kind: type[_Config], **fields: Any) -> _Config:
    """A configuration, whose error message names the file.

    Raises:
      UserError: no model can have these numbers.
    """
    try:
        return kind(**fields)
    except UserError as error:
        raise UserError(f"{source} does not describe a model: {error}") from error


_SAY_SIZE = "give the image size it was made for: --source_image_size=HEIGHTxWIDTH"


def square_grid(
    patches: int,
    patch_size: int,
    image_size: tuple[int, int] | None,
    source: Path,
    notes: list[str] | None = None,
) -> tuple[int, int]:
    """The image size (H, W) of `patches` patches: as given, or else square.

    Args:
      patches: how many there are.
      patch_size: their edge in pixels.
      image_size: as it was given.
      source: for messages.
      notes: gets a sentence where a square is assumed; None: the format knows none but squares.

    Raises:
      UserError: the given size has another number of patches, or none was given and the
        number is no square.
    """
    if image_size is None:
        edge = round(patches**0.5)
        if edge * edge != patches:
            raise UserError(
                f"{source} is made for {patches} patches, which is no square: {_SAY_SIZE}"
            )
        if notes is not None and edge > 1:
            notes.append(
                f"The file does not say the shape of its {patches} patches: {edge} x {edge} "
                f"assumed, --source_image_size=HEIGHTxWIDTH sets another."
            )
        return edge * patch_size, edge * patch_size
    if (image_size[0] // patch_size) * (image_size[1] // patch_size) != patches:
        raise UserError(
            f"{source} is made for {patches} patches of {patch_size} pixels, "
            f"which is not an image of {image_size[0]} x {image_size[1]}: {_SAY_SIZE}"
        )
    return image_size


def relative_size(
    rows: int,
    patch_size: int,
    image_size: tuple[int, int] | None,
    source: Path,
    notes: list[str] | None = None,
) -> tuple[int, int]:
    """The image size (H, W) of a table of relative positions, as `square_grid` has it.

    Raises:
      UserError: the table is not for that size, or for no square.
    """
    if image_size:
        height, width = (size // patch_size for size in image_size)
    else:
        height = width = (math.isqrt(max(rows - 3, 0)) + 1) // 2
    if (2 * height - 1) * (2 * width - 1) + 3 != rows:
        size = f"an image of {image_size[0]} x {image_size[1]}" if image_size else "a square"
        raise UserError(
            f"{source} has {rows} relative positions, which are not those of {size} in "
            f"patches of {patch_size} pixels: {_SAY_SIZE}"
        )
    if notes is not None and not image_size and height > 1:
        notes.append(
            f"The file does not say the shape of its {rows} relative positions: {height} x "
            f"{width} patches assumed, --source_image_size=HEIGHTxWIDTH sets another."
        )
    return height * patch_size, width * patch_size


def guess_heads(depth: int, width: int, mlp_dim: int, source: Path) -> tuple[int, str]:
    """The number of heads where a file does not say it, and a note to the reader.

    Raises:
      UserError: the width is neither that of a known variant nor a multiple of 64.
    """
    for name, (*shape, heads) in VARIANTS.items():
        if shape == [depth, width, mlp_dim]:
            return heads, f"The file does not say the number of heads: {heads}, as in {name}."
    if width % 64:
        raise UserError(
            f"{source} does not say the number of heads, and a width of {width} is not a "
            f"multiple of 64 to infer it from: give it with --num_heads=N"
        )
    heads = width // 64
    note = f"The file does not say the number of heads: {heads}, of width 64, assumed"
    return heads, f"{note}, --num_heads=N sets another."


def class_token(found: bool, pool: str) -> bool | None:
    """The field `class_token` of a configuration: None where the pooling decides it."""
    return None if found == (pool in ("cls", "cls_gap")) else found


# ---- the one check -------------------------------------------------------------------------


def check_arrays(
    found: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Compares names and shapes.

    Raises:
      UserError: listing all arrays that are missing, unknown or of another shape.
    """
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in wanted]
    wrong += [
        f"{name} has shape {found[name].shape}, not {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if wrong:
        raise UserError(f"{source} does not fit its model: {'; '.join(wrong)}")


def learned_positions(cfg: ViTConfig, params: Params) -> np.ndarray:
    """The position embeddings of any kind as one learned table, (1, T, D) float32.

    T counts the class token, if there is one, but no registers: they have no position.
    """
    encoder = params["Transformer"]
    if cfg.posemb == "learned":
        return np.asarray(encoder["posembed_input"]["pos_embedding"])
    rows, columns = cfg.grid
    table = np.zeros((rows * columns, cfg.width), np.float32)
    if cfg.posemb == "sincos2d":
        table = np.asarray(posemb_sincos_2d(cfg.grid, cfg.width))
    elif cfg.posemb == "learned_2d":
        halves = encoder["posembed_input"]
        shape = (rows, columns, cfg.width // 2)
        x = np.broadcast_to(halves["pos_embedding_x"], shape)
        y = np.broadcast_to(np.asarray(halves["pos_embedding_y"])[:, None], shape)
        table = np.concatenate([x, y], axis=-1).reshape(table.shape)
    return with_prefix_rows(table[None], cfg.positioned_prefix)


def with_prefix_rows(table: np.ndarray, count: int) -> np.ndarray:
    """Zero rows in front: a token without a position is one whose position is zero."""
    return np.pad(table, ((0, 0), (count, 0), (0, 0)))
