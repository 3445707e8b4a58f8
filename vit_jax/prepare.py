"""Packs a data set into few large files, to read it faster than many small ones.

  python -m vit_jax.prepare SOURCE OUTPUT
  python -m vit_jax.prepare folder:photos photos.packed
  python -m vit_jax.train --config.data.source=records:photos.packed ...

SOURCE is what `data.source` takes; OUTPUT is a new folder. All splits are packed, or those of
--split, which can also cut and rename them: --split="train=train[:98%],val=train[98%:]".
Examples stay in their order, so that `train[:98%]` of the packed data holds what it holds of
SOURCE. Images are stored as they are, byte by byte (pixels as PNG); with --resize_shorter,
larger ones are made smaller and stored as JPEG of quality 95, which saves decoding time in
every epoch. Networks and cold disks are slow at many files; from a disk whose files are
in memory already, both forms are read at the same speed.

Every image is decoded once to check it. One that cannot be decoded is left out, reported on
stderr and listed in OUTPUT/dataset.json; more than --max_bad of them are an error. OUTPUT
appears only when it is complete: an interrupted run leaves nothing.
"""

from pathlib import Path

from absl import flags

from vit_jax.command_line import cli
from vit_jax.data.packing import Options, prepare
from vit_jax.data.sources import catalog, records
from vit_jax.system.errors import UserError


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
