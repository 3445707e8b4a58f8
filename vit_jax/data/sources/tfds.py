"""TensorFlow data sets, read as array_record files and without TensorFlow."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vit_jax.data.sources.source import Source, digest
from vit_jax.data.sources.splits import pick_split
from vit_jax.system.errors import UserError

_INFO = "dataset_info.json"


@dataclass(frozen=True)
class TfdsSource:
    """One split of a prepared data set; images arrive encoded, as they were stored."""

    records: Sequence[Any]
    image_key: str
    label_key: str
    class_names: tuple[str, ...]
    name: str
    prepared: str  # what was: name, config, version, split, and sizes of its files

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self.records[i]
        return {
            "image": record[self.image_key],
            "label": int(record[self.label_key]),
            "name": f"{self.name}[{i}]",
        }

    def fingerprint(self, start: int, stop: int) -> str:
        """Of what was prepared and where in it: labels lie in the records, with the images."""
        return digest(self.prepared, self.image_key, self.label_key, f"{start}:{stop}")


def open_tfds(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens a whole split of `name`, `name/config:version`, or a prepared folder.

    The files suffice: the code that built the data set is neither needed nor imported.
    Nothing is fetched. Raises UserError if the set is not prepared, was prepared as
    TFRecord, lacks the split, or has no image or class label.
    """
    builder, directory = _builder(name, data_dir)
    split = pick_split(split, tuple(builder.info.splits), f"tfds:{name}")
    image_key, label_key = _keys(builder, name)
    label = builder.info.features[label_key]
    try:
        records = builder.as_data_source(split, decoders=_skip_images(builder.info.features))
    except NotImplementedError as error:
        raise UserError(
            f"tfds:{name} was prepared under {str(directory)!r} as "
            f"{builder.info.file_format.value}, which needs TensorFlow to read; prepare it "
            f"again elsewhere with {_build_command(name, 'OTHER_DIR')}."
        ) from error
    names = tuple(label.names or map(str, range(label.num_classes)))
    sizes = builder.info.splits[split]
    prepared = f"{builder.info.full_name} {split} {sizes.shard_lengths} {sizes.num_bytes}"
    return TfdsSource(records, image_key, label_key, names, f"tfds:{name} {split}", prepared)


def split_names(name: str, data_dir: str | None = None) -> tuple[str, ...]:
    """The splits of a prepared set, the one to train on first. Raises UserError."""
    builder, _ = _builder(name, data_dir)
    return tuple(sorted(builder.info.splits, key=lambda split: (split != "train", split)))


def _builder(name: str, data_dir: str | None) -> tuple[Any, Any]:
    directory = _find(name, data_dir)
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(directory)), directory


def _find(name: str, data_dir: str | None) -> Any:
    """The folder that holds `dataset_info.json` of the given version, or the newest."""
    from tensorflow_datasets.core import Path  # a pathlib that also supports buckets (gs://)

    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    root = root.expanduser()
    base, version = name, ""
    is_path = name.startswith(("/", "~", ".", "gs://"))
    if not is_path:
        match = re.fullmatch(r"(\w+(?:/[\w.-]+)?)(?::(\d+\.\d+\.\d+))?", name)
        if match is None:
            raise UserError(
                f"tfds:{name} is not a data set name; write it like tfds:cifar10, "
                "tfds:name/config:1.0.0 or tfds:/path/to/prepared/folder."
            )
        base, version = match[1], match[2] or ""
    folder = root / Path(base).expanduser()  # an absolute path replaces the root
    if (folder / _INFO).is_file():
        return folder
    versions = [path.parent for path in _config(folder, name).glob(f"*/{_INFO}")]
    versions = [path for path in versions if version in ("", path.name)]
    if not versions and is_path:
        raise UserError(
            f"folder {str(folder)!r} holds no prepared data set; give one with a {_INFO}, or a "
            "name such as tfds:cifar10."
        )
    if not versions:
        raise UserError(
            f"tfds:{name} is not prepared under {str(root)!r}; prepare it with "
            f"{_build_command(name, str(root))}."
        )
    return max(versions, key=lambda path: [int(x) for x in re.findall(r"\d+", path.name)])


def _config(folder: Any, name: str) -> Any:
    """The only config of a data set that has configs, else the data set's own folder."""
    configs = sorted({path.parent.parent for path in folder.glob(f"*/*/{_INFO}")})
    if len(configs) > 1:
        raise UserError(
            f"tfds:{name} has several configs under {str(folder)!r}; add one of them after a "
            f"slash: {', '.join(path.name for path in configs)}."
        )
    return configs[0] if configs else folder


def _build_command(name: str, data_dir: str) -> str:
    """The command, and what must be there for sets that only a person can download."""
    command = (
        f"pip install 'vit_jax[tfds]' && tfds build {name} --data_dir={data_dir} "
        "--file_format=array_record"
    )
    if re.match(r"imagenet2012\b", name):
        return (
            f"`{command} --manual_dir=FOLDER`, where FOLDER holds ILSVRC2012_img_train.tar and "
            "ILSVRC2012_img_val.tar from image-net.org"
        )
    return f"`{command}`"


def _keys(builder: Any, name: str) -> tuple[str, str]:
    """The image and the label: those the set names itself, or the first of their kind."""
    from tensorflow_datasets import features

    found = builder.info.features
    images = [k for k, v in found.items() if isinstance(v, features.Image)]
    labels = [k for k, v in found.items() if isinstance(v, features.ClassLabel)]
    if not images or not labels:
        raise UserError(
            f"tfds:{name} cannot be used to classify images, because it has features "
            f"{', '.join(found)} and needs an Image and a ClassLabel among them."
        )
    # cifar100, say, has two labels, and its coarse one comes first in the alphabet.
    named = builder.info.supervised_keys or ()
    image = next((key for key in named if key in images), images[0])
    label = next((key for key in named if key in labels), labels[0])
    return image, label


def _skip_images(features: Any) -> dict[str, Any]:
    """Leaves all images encoded, also those that are not used."""
    import tensorflow_datasets as tfds

    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    return {key: tfds.decode.SkipDecoding() for key in images}
