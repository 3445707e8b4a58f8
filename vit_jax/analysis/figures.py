"""The inspection figures of a trained model, and the report that holds them."""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from vit_jax.analysis import attention, embeddings, plots, report
from vit_jax.checkpoints import trained
from vit_jax.data.decode import decode
from vit_jax.data.planes import with_depth
from vit_jax.data.transforms import language
from vit_jax.evaluation import inference
from vit_jax.evaluation.inference import Unreadable
from vit_jax.models.model import Out
from vit_jax.models.registry import ModelConfig
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError

FILTERS = 28  # principal components, as many as the paper's figure has (second-hand)

DISTANCE_IMAGES = 128  # that the paper averages the attention distance over

BATCH_PER_DEVICE = 8  # attention is large: 21 MB a layer and image of L/16 at 384 pixels


class Drawn(NamedTuple):
    """A figure: the stem of its files, the picture, and the numbers behind it."""

    name: str
    picture: report.Picture
    numbers: dict[str, np.ndarray]


class Seen(NamedTuple):
    """The outputs of the model for an image.

    Attributes:
      path: its file.
      probabilities: (K,) of the classes; K = 0 without a head.
      rollout: (L, rows, columns), or None if the model has no attention.
      distance: (L, k) pixels, or None.
    """

    path: str
    probabilities: np.ndarray
    rollout: np.ndarray | None
    distance: np.ndarray | None


def draw_filters(params: Any, channels: int) -> Drawn | str:
    """The components of the patch embedding, or a sentence that says why there are none."""
    kernel = params.get("embedding", params.get("stem", {})).get("kernel")
    if kernel is None:
        return "filters are not drawn: the model does not begin with patches"
    if kernel.shape[2] != channels or channels not in (1, 3):
        return (
            f"filters are not drawn: their patches have {kernel.shape[2]} channels of a "
            f"feature map, which have no colours"
        )
    filters, explained = embeddings.filter_components(np.asarray(kernel), FILTERS)
    caption = (
        f"Principal components of the {kernel.shape[-1]} learned filters of the patch "
        f"embedding, the one that explains most first: {len(filters)} of them explain "
        f"{explained.sum():.1%} of the variance. Each is scaled to its own range of values. "
        f"After figure 7 (left) of arXiv 2010.11929; that the figure there shows "
        f"{FILTERS} is known to us only at second hand."
    )
    picture = report.Picture("Filters", caption, plots.png(plots.filters(filters)))
    return Drawn("filters", picture, {"filters": filters, "explained": explained})


def draw_positions(cfg: ModelConfig, params: Any) -> Drawn | str:
    """The similarity of position embeddings, or a sentence that says why there is none."""
    if not isinstance(cfg, ViTConfig):
        return f"positions are not drawn: {_kind(cfg)} has no position embeddings"
    table = embeddings.position_embeddings(cfg, params)
    if table is None:
        offsets = ": where patches are enters as offsets, in attention"
        return (
            "positions are not drawn: the model adds no position embeddings"
            f"{offsets if cfg.relative != 'none' else ''}"
        )
    similarity = embeddings.cosine_similarity(table)
    caption = (
        f"Cosine similarity of the position embedding ({cfg.posemb}) of the patch at each row "
        f"and column, one tile each, with those of all other patches, at their places in the "
        f"tile. After figure 7 (centre) of arXiv 2010.11929."
    )
    if cfg.posemb_at == "layers":
        caption += " Every layer has its own; these are those of the first."
    if max(cfg.grid) > plots.MOST_TILES:
        caption += (
            f" Of the {cfg.grid[0]} x {cfg.grid[1]} tiles only some are shown, evenly spaced."
        )
    png = plots.png(plots.similarities(similarity))
    picture = report.Picture("Position embeddings", caption, png)
    return Drawn("positions", picture, {"similarity": similarity, "embeddings": table})


def look(
    model: trained.Trained, paths: list[str], residual: bool, batch_size: int, mesh: Mesh
) -> tuple[list[Seen], int]:
    """Runs the model on images, and reports on stderr which cannot be read.

    Returns:
      Its outputs for those that can be read, in order, and the number of the others.
    """
    cfg = model.model.config
    shapes: dict[str, tuple[int, ...]] = {"probabilities": (cfg.num_classes,)}
    if isinstance(cfg, ViTConfig):
        inner, params = attention.with_attention_summary(model.model, model.params, residual)
        model = model._replace(model=inner, params=params)
        shapes["attention_rollout"] = (cfg.depth, *cfg.grid)
        shapes["attention_distance"] = (cfg.depth, cfg.num_heads)
    to_probabilities = (
        jax.nn.sigmoid if model.config.objective.loss == "sigmoid" else jax.nn.softmax
    )

    def pack(logits: jax.Array, out: Out) -> jax.Array:
        """All requested outputs as one row for each image, since one array is returned."""
        found = {**out, "probabilities": to_probabilities(logits)[:, : cfg.num_classes]}
        return jnp.concatenate([found[name].reshape(len(logits), -1) for name in shapes], 1)

    seen: list[Seen] = []
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    rows = inference.apply_to_images(model, pack, paths, batch_size, mesh)
    bar: Any = tqdm(rows, total=len(paths), unit="image", disable=None)
    for path, row in zip(paths, bar, strict=True):
        if isinstance(row, Unreadable):
            print(f"error: {row.reason}", file=sys.stderr)
            continue
        parts = zip(shapes, np.split(row, ends[:-1]), strict=True)
        found = {name: part.reshape(shapes[name]) for name, part in parts}
        rollout, distance = found.get("attention_rollout"), found.get("attention_distance")
        seen.append(Seen(path, found["probabilities"], rollout, distance))
    return seen, len(paths) - len(seen)


def draw_distance(cfg: ViTConfig, distances: np.ndarray) -> Drawn:
    """The mean over (images, L, k) distances, NaN where a head attends to no patch."""
    counts = (~np.isnan(distances)).sum(axis=0)
    total = np.nansum(distances.astype(np.float64), axis=0)
    mean = np.divide(total, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    uniform = float(attention.patch_distances(cfg.grid, cfg.patch_size).mean())
    caption = (
        f"Mean distance in pixels from a patch to the patches that it attends to, weighted by "
        f"attention: a dot for each head, averaged over patches and {len(distances)} "
        f"image{'s' if len(distances) > 1 else ''} of {cfg.image_size[0]} x "
        f"{cfg.image_size[1]} pixels. Tokens that are no patches are left out, as queries and "
        f"as keys, and the rest of each row is rescaled to sum to 1: the paper does not spell "
        f"that out, it is our reading and not verified. After figure 7 (right) of arXiv "
        f"2010.11929, which averages over {DISTANCE_IMAGES} images."
    )
    png = plots.png(plots.distances(mean, uniform))
    picture = report.Picture("Attention distance", caption, png)
    numbers = {"distance": mean, "uniform": np.array(uniform), "per_image": distances}
    return Drawn("attention_distance", picture, numbers)


READOUTS = {
    "cls": "the class token",
    "gap": "the mean over all patches, since the head reads no class token",
    "cls_gap": "half the class token and half the mean over all patches, as the head does",
    "map": "the patches as the query of the pooling head attends to them",
}


def draw_rollouts(
    cfg: ViTConfig, seen: list[Seen], photos: list[np.ndarray], titles: list[str], method: str
) -> list[Drawn]:
    """One figure of all photos, then one of the layers for each photo."""
    rollouts = [s.rollout for s in seen if s.rollout is not None]
    names = np.array([s.path for s in seen], np.str_)
    readout = READOUTS[cfg.pool]
    if cfg.distillation == "heads":
        readout = "class and distillation token alike, as the two heads do"
    mixed = (
        "each mixed half and half with the identity for the skip connection (Abnar and "
        "Zuidema, arXiv 2005.00928)"
        if method == "residual"
        else "as they are, without the skip connection"
    )
    caption = (
        f"Each preprocessed photo, the same multiplied by its rollout, and the rollout: "
        f"attention averaged over heads, the matrices of all layers multiplied, {mixed}. Read "
        f"from {readout}. Each photo has a scale of its own. After figure 6 of arXiv "
        f"2010.11929, whose text does not mention the identity."
    )
    final = [rollout[-1] for rollout in rollouts]
    png = plots.png(plots.rollouts(photos, final, titles))
    picture = report.Picture("Attention rollout", caption, png)
    drawn = [Drawn("rollout", picture, {"rollout": np.stack(final), "names": names})]
    for i, (rollout, photo, title) in enumerate(zip(rollouts, photos, titles, strict=True)):
        png = plots.png(plots.rollout_layers(photo, rollout, title))
        picture = report.Picture(
            "Rollout by layer",
            "Attention rollout through the first layers, each from 0 to its own maximum; 1 is "
            "the average patch.",
            png,
        )
        drawn.append(Drawn(f"rollout_layers_{i + 1}", picture, {"rollout": rollout}))
    return drawn


def best(
    probabilities: np.ndarray, names: tuple[str, ...], topk: int
) -> list[tuple[str, float]]:
    """The `topk` most probable classes, most probable first."""
    order = np.argsort(-probabilities, kind="stable")[:topk]
    return [(names[k], float(probabilities[k])) for k in order]


def as_seen(model: trained.Trained, path: str) -> np.ndarray:
    """The (H, W, C) uint8 input of the model, before normalisation.

    Of images that are neither grey nor RGB, the first channels.
    """
    config = model.config
    size, channels = tuple(config.image_size), config.data.channels
    transform = language.parse_transform(config.data.eval_transform, size)
    image = transform.of(
        decode({"image": path, "name": path}, channels, config.data.bits), path
    )
    pixels = with_depth(np.asarray(image).reshape(*size, channels), 8)
    return pixels if channels in (1, 3) else pixels[..., : 3 if channels > 3 else 1]


def visualize(
    model: trained.Trained,
    paths: list[str],
    output: Path,
    rollout: str,
    topk: int,
    max_images: int,
    batch_size: int,
    mesh: Mesh,
) -> int:
    """Draws all figures into the folder `output`; returns how many images failed.

    Raises:
      UserError: `output` cannot be written, or there is nothing to draw at all.
    """
    cfg, notes = model.model.config, list(model.notes)
    if paths and (note := inference.head_note(model)):
        notes.append(note)
    attempts = [draw_filters(model.params, cfg.channels), draw_positions(cfg, model.params)]
    drawn = [a for a in attempts if isinstance(a, Drawn)]
    notes += [a for a in attempts if isinstance(a, str)]
    seen: list[Seen] = []
    layers: list[Drawn] = []
    failures = 0
    if not isinstance(cfg, ViTConfig):
        notes.append(f"attention is not drawn: {_kind(cfg)} has none")
    elif not paths:
        notes.append("attention is not drawn: pass images or a folder of them to see it")
    if paths:
        if len(paths) > DISTANCE_IMAGES:
            used = f"{DISTANCE_IMAGES} of the {len(paths)} images"
            notes.append(f"{used} are used, evenly spaced")
        paths = [paths[i] for i in plots.evenly(len(paths), DISTANCE_IMAGES)]
        seen, failures = look(model, paths, rollout == "residual", batch_size, mesh)
    if not drawn and not seen:
        raise UserError(f"there is nothing to draw: {'; '.join(notes)}")
    shown = [seen[i] for i in plots.evenly(len(seen), max_images)] if seen else []
    answers = [best(s.probabilities, model.class_names, topk) for s in shown]
    if isinstance(cfg, ViTConfig) and seen:
        distances = np.stack([s.distance for s in seen if s.distance is not None])
        drawn.append(draw_distance(cfg, distances))
        titles = [
            ": ".join([Path(s.path).name, *(f"{name}, {p:.0%}" for name, p in answer[:1])])
            for s, answer in zip(shown, answers, strict=True)
        ]
        photos = [as_seen(model, s.path) for s in shown]
        first, *layers = draw_rollouts(cfg, shown, photos, titles, rollout)
        drawn.append(first)
    for figure in [*drawn, *layers]:
        save(figure, output)
    pictures = [[d.picture] for d in layers] or [[]] * len(shown)
    sections = [
        report.Photo(s.path, answer, pictures)
        for s, answer, pictures in zip(shown, answers, pictures, strict=True)
    ]
    html = report.page(
        "What the model looks at", facts(model), [d.picture for d in drawn], sections, notes
    )
    with replacing(output / "report.html") as part:
        part.write_text(html, encoding="utf-8")
    for note in notes[len(model.notes) :]:
        print(f"note: {note}", file=sys.stderr)
    print(f"{len(drawn) + len(layers)} figures and report.html in {output}")
    return failures


def facts(model: trained.Trained) -> list[tuple[str, str]]:
    """What the report says about the model at its top."""
    cfg, config = model.model.config, model.config
    height, width = cfg.image_size
    found = [
        ("model", config.model.variant),
        ("images", f"{height} x {width} pixels, {'grey' if cfg.channels == 1 else 'colour'}"),
    ]
    if hasattr(cfg, "grid"):
        rows, columns = cfg.grid
        found.append(("patches", f"{rows} x {columns} of {cfg.patch_size} pixels"))
    return [*found, ("weights from", model.family), ("updates", f"{model.step:,}")]


def save(drawn: Drawn, output: Path) -> None:
    """Writes a figure and its numbers."""
    with replacing(output / f"{drawn.name}.png") as part:
        part.write_bytes(drawn.picture.png)
    with replacing(output / f"{drawn.name}.npz") as part:
        np.savez(part, allow_pickle=False, **drawn.numbers)


def _kind(cfg: ModelConfig) -> str:
    return f"a {type(cfg).__name__.removesuffix('Config')}"
