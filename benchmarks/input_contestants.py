"""The contestants of `benchmarks.input_pipeline`: files in a folder to batches of pixels.

All process every image in the same way, at the same quality: decode, cut, resize by antialiased
bicubic interpolation, distort. All end at uint8 on the host, which is normalised on the device.
Each runs in an endless loop.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.task import Task

EVALUATION, TRAINING, RANDAUGMENT = "eval", "train", "train, RandAugment"
TRANSFORMS = (TRAINING, RANDAUGMENT, EVALUATION)
# Of the image's shorter edge evaluation keeps as much, if it is to be made smaller.
CROP = 0.9

Batches = Iterator[np.ndarray]  # uint8; (B, H, W, C), or of torch (B, C, H, W)


def shorter_edge(size: int) -> int:
    """Pixels before the central crop; images that are as small as it are not cut."""
    return size if size <= 32 else int(size / CROP)


# --- Ours --------------------------------------------------------------------------------


def our_transform(name: str, size: int) -> str:
    crop = "random_resized_crop(0.08, 1.0, 'bicubic')|flip"
    return {
        TRAINING: crop,
        RANDAUGMENT: f"{crop}|randaugment_timm(2, 9, 0.5, True)",
        EVALUATION: f"resize_shorter({shorter_edge(size)}, 'bicubic')|center_crop('even')",
    }[name]


@dataclass(frozen=True)
class Endless:
    """A source that repeats itself, so that no worker has to be restarted."""

    source: Any

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, i: int) -> Any:
        return self.source[i % len(self.source)]


def ours(folder: str, transform: str, size: int, batch_size: int, workers: int) -> Batches:
    """As `python -m vit_jax.train` reads, by its default of 16 threads or by processes."""
    from vit_jax.data import pipeline
    from vit_jax.data.sources import catalog
    from vit_jax.data.transforms import language

    source = catalog.load(f"folder:{folder}", "all")
    parsed = language.parse_transform(our_transform(transform, size), (size, size))
    if transform == EVALUATION:
        batches = pipeline.eval_batches(
            Endless(source),
            transform=parsed,
            channels=3,
            batch_size=batch_size,
            workers=workers,
        )
    else:
        batches = pipeline.train_batches(
            source, transform=parsed, channels=3, batch_size=batch_size, seed=0, workers=workers
        )
    return (batch["image"] for batch in batches)


# --- torch and timm ----------------------------------------------------------------------


def timm(folder: str, transform: str, size: int, batch_size: int, workers: int) -> Batches:
    """timm's data set, transforms (Pillow) and collation to uint8, in torch's DataLoader."""
    from benchmarks import torch_contestants

    torch_contestants.make_torchvision_importable()
    import torch
    from PIL import Image
    from timm.data import auto_augment, create_dataset, create_transform
    from timm.data.loader import fast_collate

    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]

    def posterize_to_black(image: Any, bits: int, **options: Any) -> Any:
        """At full magnitude timm keeps 0 bits, which Pillow has refused since version 13."""
        return posterize(image, bits, **options) if bits else Image.new("RGB", image.size)

    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize_to_black
    prepare = create_transform(
        size,
        is_training=transform != EVALUATION,
        use_prefetcher=True,  # 8 bits to the end; normalisation is left to the device
        interpolation="bicubic",
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1" if transform == RANDAUGMENT else None,
        crop_pct=size / shorter_edge(size),
    )
    dataset = create_dataset("", root=folder, transform=prepare)

    class Order(torch.utils.data.Sampler):
        """Every image once, then again; shuffled in training."""

        def __iter__(self) -> Iterator[int]:
            for _ in itertools.count():
                shuffles = transform != EVALUATION
                yield from (torch.randperm if shuffles else torch.arange)(len(dataset)).tolist()

    loader = torch.utils.data.DataLoader(
        dataset, batch_size, sampler=Order(), num_workers=workers, collate_fn=fast_collate
    )
    return (images.numpy() for images, _ in loader)


# --- TensorFlow --------------------------------------------------------------------------


def tf_data(folder: str, transform: str, size: int, batch_size: int, workers: int) -> Batches:
    """tf.data with TensorFlow's own operations, which decode only the crop.

    It chooses its number of threads. JPEGs are decoded by the exact transform, as by all
    others, and not by the fast one that is its default.
    """
    import tensorflow as tf

    exact = "INTEGER_ACCURATE"

    def resized(image: Any, height: Any, width: Any) -> Any:
        image = tf.image.resize(image, (height, width), "bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    def train(path: Any) -> Any:
        encoded = tf.io.read_file(path)
        jpeg = tf.io.is_jpeg(encoded)
        shape = tf.cond(
            jpeg,
            lambda: tf.image.extract_jpeg_shape(encoded),
            lambda: tf.shape(tf.io.decode_png(encoded, 3)),
        )
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros((1, 0, 4)),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], extent[:2]], 0)
        image = tf.cond(
            jpeg,
            lambda: tf.image.decode_and_crop_jpeg(encoded, window, 3, dct_method=exact),
            lambda: tf.slice(tf.io.decode_png(encoded, 3), begin, extent),
        )
        return tf.image.random_flip_left_right(resized(image, size, size))

    def evaluate(path: Any) -> Any:
        encoded = tf.io.read_file(path)
        image = tf.cond(
            tf.io.is_jpeg(encoded),
            lambda: tf.io.decode_jpeg(encoded, 3, dct_method=exact),
            lambda: tf.io.decode_png(encoded, 3),
        )
        height, width = tf.shape(image)[0], tf.shape(image)[1]
        edge, shorter = shorter_edge(size), tf.minimum(height, width)
        image = resized(image, height * edge // shorter, width * edge // shorter)
        return tf.image.resize_with_crop_or_pad(image, size, size)

    paths = sorted(map(str, Path(folder).glob("*/*")))
    data = tf.data.Dataset.from_tensor_slices(paths)
    if transform != EVALUATION:
        data = data.shuffle(len(paths))
    data = data.repeat().map(
        evaluate if transform == EVALUATION else train, tf.data.AUTOTUNE, deterministic=True
    )
    return iter(data.batch(batch_size).prefetch(2).as_numpy_iterator())


BUILDERS: dict[str, Callable[..., Batches]] = {"ours": ours, "timm": timm, "tf_data": tf_data}


def prepare(builder: str, options: dict[str, Any], task: Task, threads: int) -> Any:
    """`(run, facts)` of a contestant; a run is one batch.

    It becomes the leader of a group of processes: it and its workers can be stopped as one.
    """
    os.setpgid(0, 0)
    start, size = time.perf_counter(), task.image_size[0]
    batches = BUILDERS[builder](batch_size=task.batch_size, size=size, **options)

    def run() -> None:
        pixels = next(batches)
        assert pixels.dtype == np.uint8
        assert pixels.size == task.batch_size * size * size * 3

    run()
    return run, {"init": time.perf_counter() - start}


def device_peak() -> None:
    """No device is used."""
