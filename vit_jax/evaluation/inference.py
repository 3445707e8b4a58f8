"""A trained model over any number of image files: decoding overlaps with computing."""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from vit_jax.checkpoints.trained import Trained
from vit_jax.data import on_device
from vit_jax.data.decode import decode
from vit_jax.data.sources import image_files
from vit_jax.data.transforms import language
from vit_jax.distributed import sharding
from vit_jax.system.errors import UserError

MEASURED_FROM = 2048  # images for each device; for fewer, measuring takes longer than it saves


class Unreadable(NamedTuple):
    """An image that could not be decoded, and why, in a sentence."""

    path: str
    reason: str


def find_images(paths: list[str]) -> list[str]:
    """Files as given, folders as the sorted image files in them, nested ones too.

    Hidden files in folders are passed over, as they are in training.

    Raises:
      UserError: a path does not exist, or a folder holds no image.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = image_files.search(path, "", {})
            if not inside.files():
                raise UserError(f"the folder {path} holds no images: pass a folder that does")
            image_files.tell_of_passed(path, image_files.passed_over(inside))
            found += map(str, sorted(path / name for name in inside.files()))
        elif path.exists():
            found.append(str(path))
        else:
            raise UserError(f"there is no file or folder {path}: check the path")
    return found


def head_note(model: Trained) -> str:
    """A sentence on a head that knows nothing, as in Google's files of ImageNet-21k, or ""."""
    heads = [model.params[name] for name in ("head", "head_dist") if name in model.params]
    if not heads or any(np.asarray(x).any() for x in jax.tree.leaves(heads)):
        return ""
    return (
        "the model's head is all zeros, so that every class is as probable as any other: "
        "fine-tune it, or use its representation (vit_jax.embed, vit_jax.evaluate --knn=20)"
    )


def check_batch_size(given: int | None, mesh: Mesh) -> int | None:
    """`--batch_size` as given, None where that is left to measuring.

    Raises:
      UserError: the devices do not divide it.
    """
    if given is not None:
        sharding.check_batch_size("--batch_size", given, mesh)
    return given


def choose_batch_size(run: Callable[[int], object], images: int, mesh: Mesh) -> int:
    """How many images at a time are fastest, found out where there are enough of them.

    32 for each device, or fewer if there are not so many. From `MEASURED_FROM` images a device
    on, twice as many as long as that is faster by 5% and fits.

    Args:
      run: does the work for a batch of so many images, and waits for the result.
      images: how many there are in all.
      mesh: whose devices share a batch.
    """
    size = min(32, -(-images // mesh.size)) * mesh.size
    best, fastest = size, 0.0
    while MEASURED_FROM * mesh.size <= images and 16 * size <= images:
        try:
            run(size)  # compiles
            start = time.perf_counter()
            run(size)
        except jax.errors.JaxRuntimeError:  # it does not fit into memory
            if not fastest:
                raise
            break
        rate = size / (time.perf_counter() - start)
        if rate < 1.05 * fastest:
            break
        best, fastest, size = size, rate, 2 * size
    return best


def _read(paths: list[str], config: Any) -> Generator[np.ndarray | Unreadable, None, None]:
    """Decodes and transforms ahead of the reader, in order; (H, W, C) uint8 or uint16 each."""
    size, channels = tuple(config.image_size), config.data.channels
    bits = config.data.bits
    transform = language.parse_transform(config.data.eval_transform, size)
    language.check_channels(transform, channels, bits)

    def read(path: str) -> np.ndarray | Unreadable:
        try:
            image = transform.of(decode({"image": path, "name": path}, channels, bits), path)
            return np.asarray(image).reshape(*size, channels)
        except UserError as error:
            return Unreadable(path, str(error))

    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=256)
    iterator = iter(grain.MapDataset.source(paths).map(read).to_iter_dataset(options))
    with contextlib.closing(iterator):
        yield from iterator


def apply_to_images(
    model: Trained,
    function: Callable[[jax.Array, dict[str, jax.Array]], jax.Array],
    paths: list[str],
    batch_size: int | None,
    mesh: Mesh,
) -> Generator[np.ndarray | Unreadable, None, None]:
    """Yields one row of `function(logits, intermediates)` for each path, in order.

    The next batch is read while the device computes; all batches have one shape, so the
    program is compiled once. `function` maps (B, K) logits and the model's intermediates to
    an array with leading axis B. Without a `batch_size` the fastest is chosen.
    """
    prepare = on_device.prepare_for_eval(model.config)

    @jax.jit
    def compute(params: Any, images: jax.Array) -> jax.Array:
        batch = prepare({"image": images}, jax.random.key(0))
        return function(*model.model.apply(params, batch["image"]))

    shape = (*model.config.image_size, model.config.data.channels)

    def rehearse(size: int) -> None:
        dtype = np.uint8 if model.config.data.bits == 8 else np.uint16
        blank = sharding.put_batch({"image": np.zeros((size, *shape), dtype)}, mesh)
        jax.block_until_ready(compute(model.params, blank["image"]))

    size = batch_size or choose_batch_size(rehearse, len(paths), mesh)

    def dispatch(group: list[Any]) -> jax.Array | None:
        images = [image for image in group if not isinstance(image, Unreadable)]
        if not images:
            return None
        padded = images + [np.zeros_like(images[0])] * (size - len(images))
        batch = sharding.put_batch({"image": np.stack(padded)}, mesh)
        return compute(model.params, batch["image"])

    def collect(group: list[Any], result: jax.Array | None) -> Iterator[Any]:
        rows = iter([] if result is None else np.asarray(result))
        for image in group:
            yield image if isinstance(image, Unreadable) else next(rows)

    reader = _read(paths, model.config)
    with contextlib.closing(reader):
        before: tuple[list[Any], jax.Array | None] = [], None
        while group := list(itertools.islice(reader, size)):
            result = dispatch(group)
            yield from collect(*before)  # while the device works on the new batch
            before = group, result
        yield from collect(*before)
