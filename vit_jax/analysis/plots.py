"""Figures of the numbers that `attention` and `embeddings` compute.

They are meant to be read in print: at most 7 inches wide, colours that colour-blind readers
can distinguish, axes with units. A file or class name may hold any characters; those that the
font lacks are drawn as boxes.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

DPI = 200
WIDTH = 7.0  # inches, the text width of a printed page
COLOURS = "viridis"  # of uniform lightness, for every kind of colour vision
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#666666"  # of Okabe and Ito, and grey
MOST_TILES = 14  # a side, beyond which tiles are too small to read


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def filters(components: np.ndarray) -> Figure:
    """(n, P, P, C) filters as small images, each scaled to its own range (figure 7, left)."""
    across = min(len(components), 7)
    down = -(-len(components) // across)
    _, high, wide, _ = components.shape
    size = (0.9 * across + 0.1, (0.9 * high / wide) * down + 0.1)
    figure = Figure(size, layout="constrained")
    for i, axes in enumerate(_grid(figure, down, across)):
        if i < len(components):
            low, top = components[i].min(), components[i].max()
            _photo(axes, (components[i] - low) / max(top - low, 1e-12))
            axes.set_axis_on()  # a frame: filters may be white at their edges
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=GREY, linewidth=0.5)
    return figure


def similarities(similarity: np.ndarray) -> Figure:
    """(rows, columns, rows, columns) cosines, one tile for each patch (figure 7, centre).

    Of a large grid only some tiles are shown, evenly spaced, each of them whole. Colours go
    from the least similarity to 1: on a scale from -1, sine-cosine embeddings look all alike.
    """
    rows, columns = similarity.shape[:2]
    shown = [evenly(n, MOST_TILES) for n in (rows, columns)]
    tiles = similarity[np.ix_(*shown)]
    down, across = tiles.shape[:2]
    gap = max(1, round(max(rows, columns) / 10))
    mosaic = np.full((down * (rows + gap) - gap, across * (columns + gap) - gap), np.nan)
    for i in range(down):
        for j in range(across):
            top, left = i * (rows + gap), j * (columns + gap)
            mosaic[top : top + rows, left : left + columns] = tiles[i, j]
    width = 5.5 if across >= down else max(5.5 * across / down, 2.8)
    height = max((width - 1.4) * mosaic.shape[0] / mosaic.shape[1], 1.4) + 0.6
    figure = Figure((width, height), layout="constrained")
    axes = figure.add_subplot()
    low = min(np.floor(similarity.min() * 10) / 10, 0.9)
    image = axes.imshow(mosaic, cmap=COLOURS, vmin=low, vmax=1, interpolation="nearest")
    places = [(rows - 1) / 2 + np.arange(down) * (rows + gap)]
    places.append((columns - 1) / 2 + np.arange(across) * (columns + gap))
    axes.set_yticks(places[0], [str(i + 1) for i in shown[0]])
    axes.set_xticks(places[1], [str(j + 1) for j in shown[1]])
    axes.tick_params(length=0, labelsize=8)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("cosine similarity")
    return figure


def distances(pixels: np.ndarray, uniform: float) -> Figure:
    """(L, k) mean attention distances against depth, a dot for each head (figure 7, right).

    `uniform` is the distance of attention that is the same everywhere, in pixels.
    """
    figure = Figure((5.5, 3.6), layout="constrained")
    axes, layers = figure.add_subplot(), np.arange(len(pixels))
    x = np.repeat(layers, pixels.shape[1])
    axes.scatter(x, pixels.ravel(), 22, BLUE, alpha=0.6, linewidths=0, label="a head")
    middle = np.ma.masked_invalid(pixels).mean(axis=1)
    axes.plot(layers, middle, "D-", color=VERMILLION, markersize=4, label="mean of the heads")
    axes.axhline(uniform, color=GREY, linestyle="--", label="uniform attention")
    axes.set_xlabel("layer (the i of encoderblock_i)")
    axes.set_ylabel("mean attention distance (pixels)")
    axes.set_ylim(0, 1.08 * max(uniform, np.ma.masked_invalid(pixels).max()) or 1)
    axes.set_xticks(layers[:: 1 + len(layers) // 13])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def rollouts(
    photos: Sequence[np.ndarray], masks: Sequence[np.ndarray], titles: Sequence[str]
) -> Figure:
    """Each photo, the photo multiplied by the rollout, and the rollout (figure 6).

    Args:
      photos: (H, W, C) uint8.
      masks: (rows, columns) rollouts, of any scale.
      titles: one for each photo.
    """
    pairs = 2 if len(photos) > 1 else 1
    down = -(-len(photos) // pairs)
    panel = (WIDTH - 0.2) / (3 * pairs)
    height = min(panel * photos[0].shape[0] / photos[0].shape[1], 3.0)
    figure = Figure((WIDTH, down * (height + 0.65)), layout="constrained")
    cells = np.ravel(figure.subfigures(down, pairs, squeeze=False))
    for i, (photo, mask, title) in enumerate(zip(photos, masks, titles, strict=True)):
        cells[i].suptitle(_short(title), fontsize=9, parse_math=False)
        axes = _grid(cells[i], 1, 3)
        share = relative(mask)
        scale = Normalize(0, max(share.max(), 1e-12))
        large = enlarge(share, photo.shape[:2])
        _photo(axes[0], photo / 255)
        _photo(axes[1], photo / 255 * scale(large)[..., None])
        image = axes[2].imshow(large, cmap=COLOURS, norm=scale)
        bar = cells[i].colorbar(
            image, ax=axes, location="bottom", shrink=0.6, aspect=30, pad=0.02
        )
        bar.ax.tick_params(labelsize=7)
        bar.set_label("rollout, 1 = the average patch", fontsize=7)
    return figure


def rollout_layers(photo: np.ndarray, masks: np.ndarray, title: str) -> Figure:
    """(L, rows, columns) rollouts through the first layers, of an (H, W, C) uint8 photo.

    Each has a scale of its own, and its largest value below its name: later layers are often
    much more even than the first.
    """
    across = min(len(masks) + 1, 7 if len(masks) > 11 else 5)
    down = -(-(len(masks) + 1) // across)
    panel = (WIDTH - 1) / across
    height = min(panel * photo.shape[0] / photo.shape[1], 3.0) + 0.38
    figure = Figure((WIDTH, max(down * height + 0.3, 1.8)), layout="constrained")
    figure.suptitle(_short(title), fontsize=9, parse_math=False)
    axes = _grid(figure, down, across)
    _photo(axes[0], photo / 255)
    axes[0].set_title("photo", fontsize=7)
    for i, mask in enumerate(masks):
        share = relative(mask)
        most = share.max()
        large = enlarge(share, photo.shape[:2])
        axes[i + 1].imshow(large, cmap=COLOURS, vmin=0, vmax=max(most, 1e-12))
        layers = "layer 0" if i == 0 else f"layers 0-{i}"
        axes[i + 1].set_title(f"{layers}\nmax {most:.2f}", fontsize=7)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), ax=axes, aspect=30)
    bar.set_label("rollout / its max", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def relative(mask: np.ndarray) -> np.ndarray:
    """A non-negative array divided by its mean, or zeros where that is zero."""
    mask = np.asarray(mask, np.float64)
    return mask / mask.mean() if mask.any() else np.zeros_like(mask)


def enlarge(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A float image resized bilinearly to (H, W)."""
    image = Image.fromarray(np.asarray(mask, np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))


def evenly(n: int, most: int) -> np.ndarray:
    """At most `most` of 0 .. n - 1, evenly spaced, the first and the last among them."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int)


def _grid(figure: Figure, down: int, across: int) -> list[Axes]:
    """Axes without ticks and frames, row by row."""
    found = list(np.ravel(figure.subplots(down, across, squeeze=False)))
    for axes in found:
        axes.set_axis_off()
    return found


def _photo(axes: Axes, image: np.ndarray) -> None:
    """(H, W, 1 or 3) values from 0 to 1, pixels as they are."""
    rgb = np.broadcast_to(image, (*image.shape[:2], 3))
    axes.imshow(rgb.clip(0, 1), interpolation="nearest")


def _short(title: str, most: int = 44) -> str:
    half = most // 2 - 1
    return title if len(title) <= most else f"{title[:half]}…{title[-half:]}"
