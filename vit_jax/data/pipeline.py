"""Batches in an order that depends on the seed and the step alone.

The batch of step s is the same whatever the number of threads, worker processes or
processes of the run, and it can be made without making the batches before it. So a
checkpoint stores nothing about the data but the step number.
"""

import contextlib
import math
import os
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data import bad_images
from vit_jax.data.bad_images import BadImages, Replacing
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.image_cache import Kept
from vit_jax.data.sources.multi_label import is_multi_label
from vit_jax.data.sources.source import Source
from vit_jax.data.transforms.language import Transform, check_channels
from vit_jax.data.workers import end_with_the_parent, free_shared_memory, start_tracker
from vit_jax.system.errors import UserError

# Seconds of CPU time below which an image is small: between a PNG of 32 x 32, which takes about
# 0.00015, and a photograph of 500 x 375, which takes about 0.002. No more was measured.
QUICK = 0.0005

Batch = dict[str, np.ndarray]
Example = dict[str, Any]  # as a batch, with the bytes of its pixels and plain numbers
DTYPES = {"label": np.int32, "targets": np.float32, "mask": np.float32, "bad": np.int64}


@dataclass(frozen=True)
class Views:
    """So many images more, each made by `transform` from the same decoded one."""

    transform: Transform
    count: int

    def draw(
        self, image: Image.Image, rng: np.random.Generator | None, name: str = ""
    ) -> list[Image.Image]:
        return [self.transform.of(image, name, rng) for _ in range(self.count)]


class Batches(Iterator[Batch]):
    """An iterator over batches; `close()` ends its threads and worker processes."""

    def __init__(
        self, iterator: Any, bad: BadImages | None = None, workers: bool = False
    ) -> None:
        self._open, self._bad = [iterator], bad
        # At the latest when Python exits: Grain's own clean-up is too late, and prints errors.
        self._finalizer = weakref.finalize(self, _close_all, self._open, workers)

    def __next__(self) -> Batch:
        if not self._open:
            raise ValueError("these batches are closed; make new ones to go on")
        # A worker's batch lies in shared memory that is freed with the worker: copy it.
        batch = {
            key: value if type(value) is np.ndarray else np.array(value)
            for key, value in next(self._open[0]).items()
        }
        positions = batch.pop("bad")
        if self._bad is not None:
            for i in positions[positions != bad_images.NONE].tolist():
                self._bad.add(i)
        return batch

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close_all(iterators: list[Any], workers: bool) -> None:
    while iterators:
        iterators.pop().close()
    if workers:
        free_shared_memory()


def train_batches(
    source: Source,
    *,
    transform: Transform,
    channels: int,
    batch_size: int,
    seed: int,
    views: Mapping[str, Views] | None = None,
    repeats: int = 1,
    first_step: int = 0,
    parts: Sequence[int] = (0,),
    part_count: int = 1,
    workers: int = 0,
    threads: int = 16,
    prefetch: int = 2,
    max_bad: float = 0.0,
    bits: int = 8,
) -> Batches:
    """This process's share of the endless batches from step `first_step` on.

    Every batch consists of `part_count` equal parts, of which this process reads `parts`, one
    after the other: put in their places, they are what one process would get.

    Yields `image` uint8 (uint16 with 16 `bits`) (b, H, W, C) and `label` int32 (b,), with b
    examples in these parts. Of a source whose images have several labels, `targets` float32
    (b, K), of 0 and 1, replace `label`.
    Every epoch is shuffled again, and batches may span two epochs. `prefetch`
    batches are made ahead, by up to `threads` threads, as many as are of use, or, if there
    are any, by `workers` processes.
    Of the examples the share `max_bad` may be bad images, which others replace.

    With `views`, a batch holds more of each image, which is decoded once: under every name
    uint8 (b, n, h, w, C), n images by a transform of their own. So multi-crop is made (arXiv
    2006.09882, 2104.14294; `recipes.dino`); no objective of this package takes several crops
    of an image yet. Views are drawn after `image`, in the order given: they do not change it.

    With `repeats` R every image comes R times in a row, each time augmented again (repeated
    augmentation, arXiv 1902.05509, as DeiT has it, arXiv 2012.12877). A batch puts the copies
    of an image far apart: first one of each image, then another of each, so that mixing finds
    partners among other images, and processes share the images of a batch. Where R does not
    divide the batch, a few images have some of their copies in the next one. An epoch of n
    examples still is n / batch_size steps; it shows n / R images, and R epochs show each of
    the n images R times. (DeiT shuffles again after every n examples, so that chance decides
    which third of the images an epoch shows; here none is left out.)

    Raises UserError for an empty source, sizes that do not fit and views of a name or count
    that cannot be; and while iterating, for files that cannot be read, more bad images than
    `max_bad` allows and labels out of range.
    """
    import grain

    share = _Share(batch_size, tuple(parts), part_count, first_step, repeats)
    _check(source, share)
    if repeats < 1:
        raise UserError(
            f"repeats is {repeats}: use 1 to take each image once, or 2 and more for repeated "
            "augmentation."
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is out of range; choose one from 0 to 4294967295.")
    views = views or {}
    _check_views(views)
    prepare = _Prepare.of(source, transform, channels, views, bits)
    bad = BadImages(source, int(max_bad * len(source)), prepare.try_out)
    decoded = Replacing(Kept(source, channels, bits=bits), bad.limit)
    # Only positions pass through Grain here: in every example it would look for arrays, to
    # count their bytes, which is slow for small images.
    places = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    if repeats > 1:
        # Grain draws by an example's place: so each copy gets a place, and draws, of its own.
        places = grain.MapDataset.source(_Repeated(places, repeats)).seed(seed)
    examples = places.random_map(_Augmented(decoded, prepare))
    steps = sys.maxsize // batch_size - first_step
    local = _Local(examples, share, steps)
    return _iterate(local, prepare, workers, threads, prefetch, bad)


def eval_batches(
    source: Source,
    *,
    transform: Transform,
    channels: int,
    batch_size: int,
    parts: Sequence[int] = (0,),
    part_count: int = 1,
    workers: int = 0,
    threads: int = 16,
    prefetch: int = 2,
    max_bad: float = 0.0,
    bits: int = 8,
) -> Batches:
    """This process's share of every example once, in the order of the source.

    Yields what `train_batches` does and `mask` float32 (b,), which is 0 for bad images, and
    where the last batch is filled up with black images. All batches have one shape, and all
    processes have as many of them. Raises UserError as `train_batches` does.
    """
    share = _Share(batch_size, tuple(parts), part_count)
    _check(source, share)
    prepare = _Prepare.of(source, transform, channels, {}, bits)
    bad = BadImages(source, int(max_bad * len(source)), prepare.try_out)
    padded = _Padded(source, prepare, skips=bad.limit > 0)
    steps = -(-len(source) // batch_size)
    local = _Local(padded, share, steps)
    return _iterate(local, prepare, workers, threads, prefetch, bad)


def _iterate(
    local: "_Local",
    prepare: "_Prepare",
    workers: int,
    threads: int,
    prefetch: int,
    bad: BadImages,
) -> Batches:
    """Threads work on the pieces of one batch together, worker processes on one batch each.

    Batches must be whole before they reach the workers, which take turns: otherwise their
    number would decide what a batch holds.
    """
    import grain

    size = local.share.size
    if workers == 0:
        threads = _useful(threads, local) if threads > 1 else threads
        piece = _piece_size(size, threads)
        count = size // piece
        options = grain.ReadOptions(threads, max(prefetch * count, threads))
        read = grain.MapDataset.source(
            _Pieces(local, piece, prepare.shapes, prepare.dtype)
        ).to_iter_dataset(options)
        return Batches(iter(read.batch(count, batch_fn=_join)), bad)
    _mark_flags_as_parsed()
    whole = grain.MapDataset.source(_Pieces(local, size, prepare.shapes, prepare.dtype))
    batches = whole.to_iter_dataset(grain.ReadOptions(1, 1))
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch)
    start_tracker()
    return Batches(iter(batches.mp_prefetch(options, end_with_the_parent)), bad, workers=True)


def _useful(threads: int, local: "_Local") -> int:
    """How many of so many threads are of use, judged by how long three examples take.

    As many as there are cores, and more the longer they wait for a disk.

    One, if images are small. Then most work holds Python's global lock, which threads pass to
    each other at every call of Pillow: on two cores 16 of them took 440 us of CPU time for a
    PNG of 32 x 32, and two took 275.
    """
    walls, works = [], []
    for i in range(min(3, len(local))):
        work, wall = time.thread_time(), time.perf_counter()
        with contextlib.suppress(UserError):  # raised again when a batch is read
            local[i]
        walls.append(time.perf_counter() - wall)
        works.append(time.thread_time() - work)
    work = max(min(works), 1e-6)
    return min(threads, max(1, round((1 if work < QUICK else _cores()) * min(walls) / work)))


def _cores() -> int:
    """As many as this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _piece_size(size: int, threads: int) -> int:
    """How many examples a thread takes at a time; it divides `size`.

    So many that Grain's work for what a thread takes, which is more than that of decoding a
    small image, is shared by some examples; so few that all threads have a part of a batch.
    """
    most = min(32, size // max(threads, 1))
    return next((n for n in range(most, 1, -1) if size % n == 0), 1)


def _join(pieces: Sequence[Batch]) -> Batch:
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}


def _mark_flags_as_parsed() -> None:
    """Grain's workers read absl flags, which a notebook or a test has not parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _check(source: Source, share: "_Share") -> None:
    if share.batch_size < 1 or share.batch_size % share.part_count:
        raise UserError(
            f"batch size {share.batch_size} cannot be divided into "
            f"{share.part_count} equal part(s); make it a multiple of that."
        )
    if len(source) == 0:
        raise UserError("the data source holds no examples; choose another source or split.")


def _check_views(views: Mapping[str, Views]) -> None:
    for name, view in views.items():
        if name in ("image", *DTYPES):
            raise UserError(f"views cannot be named {name!r}, as batches have it: rename them.")
        if not isinstance(view.count, int) or view.count < 1:
            raise UserError(
                f"the count of views {name!r} is {view.count}: make it a whole number of at "
                "least 1."
            )


@dataclass(frozen=True)
class _Share:
    """Which rows of every global batch are this process's."""

    batch_size: int
    parts: tuple[int, ...]
    part_count: int
    first_step: int = 0
    repeats: int = 1

    @property
    def size(self) -> int:
        return len(self.parts) * self.part_size

    @property
    def part_size(self) -> int:
        return self.batch_size // self.part_count

    def position(self, i: int) -> int:
        """The position of this process's i-th example among the examples of all batches.

        There the copies of an image are adjacent; in a batch, the first copies of all images
        come first, then all second copies, and so on.
        """
        step, row = divmod(i, self.size)
        part, row = divmod(row, self.part_size)
        row += self.parts[part] * self.part_size
        start = (self.first_step + step) * self.batch_size
        for copy in range(self.repeats):
            first = start + (copy - start) % self.repeats
            same = range(first, start + self.batch_size, self.repeats)
            if row < len(same):
                return same[row]
            row -= len(same)
        raise IndexError(i)  # not reached: the copies make up the batch


@dataclass(frozen=True)
class _Local:
    """The examples of one process, in its order, for so many steps."""

    examples: Any
    share: _Share
    steps: int

    def __len__(self) -> int:
        return self.steps * self.share.size

    def __getitem__(self, i: int) -> Example:
        return self.examples[self.share.position(i)]


@dataclass(frozen=True)
class _Pieces:
    """Examples in stacks of `size`, with pixels of the given shapes."""

    examples: _Local
    size: int
    shapes: dict[str, tuple[int, ...]]
    dtype: np.dtype

    def __len__(self) -> int:
        return len(self.examples) // self.size

    def __getitem__(self, i: int) -> Batch:
        first = i * self.size
        examples = [self.examples[j] for j in range(first, first + self.size)]
        stack = {}
        for key, shape in self.shapes.items():
            # Faster than making an array of each and stacking them.
            pixels = b"".join([example[key] for example in examples])
            stack[key] = np.frombuffer(pixels, self.dtype).reshape(-1, *shape)
        for key in examples[0].keys() - stack.keys():
            stack[key] = np.array([example[key] for example in examples], DTYPES[key])
        return stack


@dataclass(frozen=True)
class _Repeated:
    """Every example `repeats` times in a row."""

    examples: Any
    repeats: int

    def __len__(self) -> int:
        return len(self.examples)  # endless

    def __getitem__(self, i: int) -> Any:
        return self.examples[i // self.repeats]


@dataclass(frozen=True)
class _Prepare:
    """Decodes and transforms one example."""

    transform: Transform
    channels: int
    classes: int
    views: Mapping[str, Views]
    several: bool  # labels of an image
    bits: int

    @classmethod
    def of(
        cls,
        source: Source,
        transform: Transform,
        channels: int,
        views: Mapping[str, Views],
        bits: int,
    ) -> "_Prepare":
        for each in (transform, *(view.transform for view in views.values())):
            check_channels(each, channels, bits)
        classes, several = len(source.class_names), is_multi_label(source)
        return cls(transform, channels, classes, views, several, bits)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.bits == 8 else np.uint16)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of pixels that an example has."""
        return {"image": (*self.transform.image_size, self.channels)} | {
            name: (view.count, *view.transform.image_size, self.channels)
            for name, view in self.views.items()
        }

    def __call__(
        self, example: dict[str, Any], rng: np.random.Generator | None = None
    ) -> Example:
        label = example["label"]
        if not self.several and not 0 <= label < self.classes:
            raise UserError(
                f"{example['name']} has label {label}, but the classes are numbered 0 to "
                f"{self.classes - 1}; choose a split with labels, or correct the data set."
            )
        whole = decode(example, self.channels, self.bits)
        prepared = {
            "image": self.transform.of(whole, example["name"], rng).tobytes(),
            ("targets" if self.several else "label"): label,
            "bad": example.get("bad", bad_images.NONE),
        }
        for name, view in self.views.items():
            made = view.draw(whole, rng, example["name"])
            prepared[name] = b"".join(image.tobytes() for image in made)
        return prepared

    def try_out(self, example: dict[str, Any]) -> None:
        """Raises BadImage if the example is one."""
        self(example, np.random.default_rng(0))


@dataclass(frozen=True)
class _Augmented:
    """The example at a position of the source, with its own random numbers."""

    source: Replacing
    prepare: _Prepare

    def __call__(self, place: int, rng: np.random.Generator) -> Example:
        return self.source.good(place, lambda example: self.prepare(example, rng))


@dataclass(frozen=True)
class _Padded:
    """The examples of a source with a mask of 1, then any number of blanks with 0."""

    source: Source
    prepare: _Prepare
    skips: bool

    def __getitem__(self, i: int) -> Example:
        if i >= len(self.source):
            return self._blank(bad_images.NONE)
        try:
            return self.prepare(self.source[i]) | {"mask": 1}
        except BadImage:
            if not self.skips:
                raise
            return self._blank(i)

    def _blank(self, bad: int) -> Example:
        size = self.prepare.dtype.itemsize
        shapes = self.prepare.shapes.items()
        black = {key: bytes(size * math.prod(shape)) for key, shape in shapes}
        several = self.prepare.several
        label = {"targets": np.zeros(self.prepare.classes, bool)} if several else {"label": 0}
        return black | label | {"mask": 0, "bad": bad}
