"""Any data set packed into a few large files."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import vit_jax
from vit_jax.data.bad_images import DEFAULT_SHARE, BadImages
from vit_jax.data.decode import MOST_BYTES, BadImage, decode
from vit_jax.data.planes import Planes
from vit_jax.data.sources import catalog, records
from vit_jax.data.sources.records import Packed
from vit_jax.data.sources.source import Source
from vit_jax.data.transforms.deferred import resize
from vit_jax.system import bounded
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError

EXAMPLES_A_SHARD = 10_000  # about 1 GB of ImageNet

_QUALITY = 95


class Options(NamedTuple):
    """How to pack.

    Attributes:
      shards: files of each split; None: one for 10,000 examples.
      resize_shorter: the shorter side of larger images afterwards, in pixels; None: as it is.
      max_bad: how many images of a split may be left out; None: one in a hundred.
      threads: that decode.
    """

    shards: int | None = None
    resize_shorter: int | None = None
    max_bad: int | None = None
    threads: int = 16


def prepare(
    source: str,
    output: Path,
    splits: dict[str, str],
    options: Options,
    data_dir: str | None,
    multi_label: str | None = None,
) -> dict[str, Any]:
    """Packs `splits` (name: which part of `source`) into the folder `output`, atomically.

    Returns:
      For each split its number of `examples`, its `shards` and what was `left_out`.

    Raises:
      UserError: the source cannot be read, its splits have different classes, there are too
        many bad images, or `output` cannot be written.
    """
    how = (data_dir, multi_label) if multi_label else (data_dir,)
    opened = {name: catalog.load(source, split, *how) for name, split in splits.items()}
    class_names = next(iter(opened.values())).class_names
    if any(split.class_names != class_names for split in opened.values()):
        raise UserError(
            f"the splits {', '.join(opened)} of {source} have different classes; pack each of "
            "them to an output of its own with --split."
        )
    packed = {}
    with replacing(output) as folder:
        folder.mkdir()
        for name, split in opened.items():
            packed[name] = {
                "source": source,
                "split": splits[name],
                "resize_shorter": options.resize_shorter,
                "vit_jax": vit_jax.__version__,
                **_pack(folder, name, split, options),
            }
        records.write_info(folder, class_names, packed)
    return packed


def _pack(folder: Path, name: str, source: Source, options: Options) -> dict[str, Any]:
    shards = min(options.shards or -(-len(source) // EXAMPLES_A_SHARD), len(source))
    limit = options.max_bad
    bad = BadImages(source, int(DEFAULT_SHARE * len(source)) if limit is None else limit)

    def good(results: Iterator[Packed | BadImage]) -> Iterator[Packed | None]:
        shown = tqdm(results, name, len(source), unit="image", disable=None)
        for i, result in enumerate(shown):
            if isinstance(result, BadImage):
                bad.add(i, str(result))
            yield None if isinstance(result, BadImage) else result

    with contextlib.closing(_read(source, options)) as results:
        packed = records.write_split(folder, name, good(results), len(source), shards)
    if not packed["examples"]:
        raise UserError(f"no image of split {name!r} can be used; choose another --split.")
    return {**packed, "left_out": list(bad.reasons.values())}


def _read(source: Source, options: Options) -> Any:
    """Yields the examples of `source` encoded and tried, in order, made ahead by threads."""
    import grain

    def encode(example: dict[str, Any]) -> Packed | BadImage:
        try:
            image = encoded(example, options.resize_shorter)
        except BadImage as error:
            return error
        return Packed(image, example["label"], example["name"])

    # A few hundred images ahead, which are small beside what they are decoded to.
    reading = grain.ReadOptions(options.threads, 256)
    return iter(grain.MapDataset.source(source).map(encode).to_iter_dataset(reading))


def encoded(example: dict[str, Any], resize_shorter: int | None) -> bytes:
    """The image of an example as bytes in a format that `decode` reads.

    Raises:
      BadImage: it cannot be decoded.
      UserError: its file cannot be read.
    """
    content = example["image"]
    if isinstance(content, str):
        try:
            content = bounded.read(content, MOST_BYTES)
        except bounded.Unfit as error:
            raise BadImage(
                f"image {example['name']} cannot be read ({error.strerror}); remove it."
            ) from error
        except OSError as error:
            raise UserError(
                f"image {example['name']} cannot be read ({error.strerror}); put it back, or "
                "begin again."
            ) from error
    image = decode({**example, "image": content}, None, None)
    smaller = bool(resize_shorter) and min(image.size) > (resize_shorter or 0)
    if smaller and resize_shorter:
        scale = resize_shorter / min(image.size)
        width, height = (max(round(side * scale), 1) for side in image.size)
        image = resize(image, (height, width), "bicubic")
        if isinstance(image, Image.Image):
            return _save(image, "JPEG", quality=_QUALITY)
    if not smaller and not isinstance(content, np.ndarray):
        return content
    return _save(image, "PNG") if isinstance(image, Image.Image) else _save_array(image)


def _save_array(image: Planes) -> bytes:
    """Channels that no picture format has, as an .npy file."""
    file = io.BytesIO()
    np.save(file, image.pixels())
    return file.getvalue()


def _save(image: Image.Image, form: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
