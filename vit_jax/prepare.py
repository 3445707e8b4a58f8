"""Packs a data set into few large files, to read it faster than many small ones.

  python -m vit_jax.prepare SOURCE OUTPUT
  python -m vit_jax.prepare folder:photos photos.packed
  python -m vit_jax.train --config.data.source=records:photos.packed ...

SOURCE is what `data.source` takes; OUTPUT is a new folder. All splits are packed, or those of
--split, which can also cut and rename them: --split="train=train[:98%],val=train[98%:]".
Examples stay in their order, so that `train[:98%]` of the packed data holds what it holds of
SOURCE. Images are stored as they are, byte by byte (pixels as PNG); with --resize_shorter,
larger ones are made smaller and stored as JPEG of quality 95, which saves decoding time in
every epoch. Files are what networks and cold disks are slow at, by their number; from a disk
whose files are in memory already, both are read at one speed.

Every image is decoded once to see that it can be. What cannot is left out, told of on stderr
and listed in OUTPUT/dataset.json; more than --max_bad of them are an error. OUTPUT appears
when it is complete: stopped in between, nothing is left.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

import vit_jax
from vit_jax.command_line import cli
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


# ---- The door ----------------------------------------------------------------------------


def define_flags() -> None:
    flags.DEFINE_list("split", None, "Splits to pack, also as NAME=PART; all if not given.")
    flags.DEFINE_integer("shards", None, "Files of each split; else one for 10,000 images.", 1)
    flags.DEFINE_integer(
        "resize_shorter", None, "Make larger images smaller, to this shorter side in pixels.", 1
    )
    flags.DEFINE_integer(
        "max_bad", None, "Images of a split that may be left out; else one in a hundred.", 0
    )
    flags.DEFINE_bool("force", False, "Replace an OUTPUT that exists.")
    flags.DEFINE_string(
        "multi_label", None, "Images have several labels: as config.data.multi_label."
    )
    flags.DEFINE_string("data_dir", None, "Where tfds: finds prepared data sets.")
    flags.DEFINE_integer("threads", 16, "Threads that read and decode.", 1)


def _splits(source: str, given: list[str] | None, data_dir: str | None) -> dict[str, str]:
    """What to pack under which name. Raises UserError for a name that cannot be one."""
    splits: dict[str, str] = {}
    for item in given or catalog.split_names(source, data_dir):
        name, separator, part = item.partition("=")
        if not name.replace("_", "").replace("-", "").isalnum() or name in splits:
            raise UserError(
                f"--split={item} cannot be the name of a packed split; give each a name of its "
                'own, as in --split="train=train[:98%],val=train[98%:]".'
            )
        splits[name] = part if separator else name
    return splits


def main(positional: list[str]) -> None:
    given = flags.FLAGS
    if len(positional) != 2:
        raise UserError(
            f"{len(positional)} arguments were given: SOURCE and OUTPUT are wanted, as in "
            "`python -m vit_jax.prepare folder:photos photos.packed`."
        )
    source, output = positional[0], Path(positional[1])
    if output.exists() and not given.force:
        raise UserError(f"{output} exists: choose another OUTPUT, or replace it with --force.")
    if given.force and output.exists() and not (output / records.INFO).is_file():
        raise UserError(
            f"{output} is no packed data set, so --force does not replace it: choose another "
            "OUTPUT."
        )
    options = Options(given.shards, given.resize_shorter, given.max_bad, given.threads)
    splits = _splits(source, given.split, given.data_dir)
    packed = prepare(source, output, splits, options, given.data_dir, given.multi_label)
    for name, split in packed.items():
        without = f", {len(split['left_out']):,} left out" if split["left_out"] else ""
        print(
            f"{name}: {split['examples']:,} examples in {len(split['shards'])} files{without}"
        )
    print(f"read them with --config.data.source=records:{output}")


if __name__ == "__main__":
    cli.run(main, define_flags)
