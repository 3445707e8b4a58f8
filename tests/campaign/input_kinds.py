"""The kinds of hostile inputs, and what the commands do with each.

A kind writes an input into an empty folder and returns what it is, in words, and a function
that reads it as the commands do. That function may raise `UserError`; what it returns without
was read, and it asserts that the result is well-formed.
"""

import functools
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.campaign import bit_flips, mutations
from tests.campaign.large_tiffs import PIXELS, large_tiffs
from tests.data.test_channels import make_tiff, wide_png
from tests.interop.test_hostile import BEIT, shuffled
from tests.interop.tiny_models import model
from tests.tiny_config import tiny
from vit_jax import config as configuration
from vit_jax.checkpoints import digests, orbax_io, trained
from vit_jax.checkpoints.digests import Damaged
from vit_jax.data.decode import FORMATS, decode
from vit_jax.data.planes import Planes
from vit_jax.data.sources import catalog, classes
from vit_jax.data.sources.source import fingerprint
from vit_jax.distributed import sharding
from vit_jax.interop import google, huggingface, timm, weight_files
from vit_jax.interop.load import load_weights
from vit_jax.system.errors import UserError, of_system
from vit_jax.training import begin, grid, metrics_file

Use = Callable[[], object]
Kind = Callable[[Path, random.Random], tuple[str, Use]]


# --- Images -------------------------------------------------------------------------------


@functools.cache
def images() -> dict[str, bytes]:
    """Small pictures in all formats and modes, by the ending of their files."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    many = rng.integers(0, 256, (20, 30, 5), np.uint8)
    wide = rng.integers(0, 65536, (20, 30, 3), np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {
        "array.npy": _npy(np.asarray(colours)),
        "wide.npy": _npy(wide),
        "many.npy": _npy(many),
        "wide.png": wide_png(wide),
        "many.tif": make_tiff(many),
        "apart.tif": make_tiff(many, ">", apart=True, deflate=True),
        "tiled.tif": make_tiff(wide, tile=(16, 16)),
    }
    frames = [colours.rotate(90 * i) for i in range(3)]
    for name, image, options in [
        ("rgb.jpg", colours, {"exif": exif}),
        ("progressive.jpg", colours, {"progressive": True}),
        ("cmyk.jpg", colours.convert("CMYK"), {}),
        ("grey.jpg", colours.convert("L"), {}),
        ("rgb.png", colours, {"exif": exif}),
        ("palette.png", colours.quantize(16), {"transparency": 3}),
        ("alpha.png", colours.convert("RGBA"), {}),
        ("bits.png", colours.convert("1"), {}),
        ("frames.gif", frames[0], {"save_all": True, "append_images": frames[1:]}),
        ("rgb.webp", colours, {"exif": exif}),
        ("lossless.webp", colours.convert("RGBA"), {"lossless": True}),
        ("frames.webp", frames[0], {"save_all": True, "append_images": frames[1:]}),
        ("rgb.bmp", colours, {}),
        ("palette.bmp", colours.quantize(16), {}),
        ("rgb.ppm", colours, {}),
        ("raw.tif", colours, {"exif": exif}),
        ("lzw.tif", colours, {"compression": "tiff_lzw"}),
        ("deflate.tif", colours, {"compression": "tiff_adobe_deflate"}),
        ("packbits.tif", colours, {"compression": "packbits"}),
        ("jpeg.tif", colours, {"compression": "jpeg"}),
        ("rgb.jp2", colours, {}),
        ("rgb.avif", colours, {}),
    ]:
        form = Image.registered_extensions()[os.path.splitext(name)[1]]
        if form in FORMATS:
            file = io.BytesIO()
            image.save(file, form, **options)
            found[name] = file.getvalue()
    return found


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def damaged_images(folder: Path, rng: random.Random) -> tuple[str, Use]:
    name = rng.choice(sorted(images()))
    whole = images()[name]
    how = rng.choice(["whole", *["bytes"] * 6, "fields", "fields", "chunks", "other"])
    data = whole
    if how == "bytes":
        data = mutations.of_bytes(whole, rng, images()[rng.choice(sorted(images()))])
    elif how == "fields" and name.endswith(".tif"):
        data = _tiff_field(whole, rng)
    elif how in ("fields", "chunks"):
        data = _sealed(mutations.of_bytes(whole, rng)) if "png" in name else _header(whole, rng)
    elif how == "other":
        data = rng.choice([*weights().values(), *TABLES.values()])
    return f"{name}, {how}", _picture(folder / name, data, rng, how == "whole")


def _header(data: bytes, rng: random.Random) -> bytes:
    """An extreme number in the first bytes, and nothing else."""
    changed, at = bytearray(data), rng.randrange(min(200, len(data)))
    width = rng.choice([2, 4])
    field = (rng.choice(mutations.EXTREMES) % 256**width).to_bytes(
        width, rng.choice(["little", "big"])
    )
    changed[at : at + width] = field
    return bytes(changed)


def _sealed(png: bytes) -> bytes:
    """A PNG whose checksums are made right again, so that more than they is looked at."""
    out, at = bytearray(png), 8
    while at + 12 <= len(out):
        end = at + 12 + int.from_bytes(out[at : at + 4], "big")
        if end > len(out):
            break
        out[end - 4 : end] = zlib.crc32(out[at + 4 : end - 4]).to_bytes(4, "big")
        at = end
    return bytes(out)


def _tiff_field(tiff: bytes, rng: random.Random) -> bytes:
    """One number in the table of tags exchanged, or a whole entry by another."""
    order: Any = "little" if tiff[:2] == b"II" else "big"
    out, start = bytearray(tiff), int.from_bytes(tiff[4:8], order)
    count = int.from_bytes(tiff[start : start + 2], order)
    at = start + 2 + 12 * rng.randrange(count)
    if rng.random() < 0.2:
        other = start + 2 + 12 * rng.randrange(count)
        out[at : at + 12] = tiff[other : other + 12]
        return bytes(out)
    offset, width = rng.choice([(0, 2), (2, 2), (4, 4), (8, 4), (8, 4), (8, 4)])
    numbers = (*mutations.EXTREMES, 2, 3, 5, 8, 16, 273, 32773, 100_000, 13_000, len(tiff))
    field = rng.choice(numbers) % 256**width
    out[at + offset : at + offset + width] = field.to_bytes(width, order)
    return bytes(out)


CHANNELS = (
    (3, 8),
    (3, 8),
    (1, 8),
    (None, 8),
    (4, 8),
    (5, 16),
    (3, 16),
    (None, 16),
    (None, None),
)


def _picture(path: Path, data: bytes, rng: random.Random, whole: bool) -> Use:
    path.write_bytes(data)
    channels, bits = (3, 8) if whole else rng.choice(CHANNELS)
    five = path.name.split(".")[0] in ("many", "apart")

    def use() -> None:
        try:
            found = decode({"image": str(path), "name": str(path)}, channels, bits)
        except UserError:
            assert not whole or five, "a whole picture was refused"
            raise
        assert found.width > 0, "an image without pixels"
        assert found.height > 0, "an image without pixels"
        if isinstance(found, Planes):
            assert channels in (None, len(found.planes))
        else:
            assert found.mode == {1: "L", 3: "RGB"}.get(channels, found.mode)
        assert not whole or {found.width, found.height} == {20, 30}

    return use


@functools.cache
def large_images() -> dict[str, bytes]:
    """Small files that promise as many pixels as are decoded, or more, or work without end."""
    side, found = PIXELS, {}
    found["most.png"] = _flat_png(side, side, 8, 0)
    found["more.png"] = _flat_png(2 * side, side, 8, 0)
    found["palette.png"] = _flat_png(side, side, 1, 3)
    found |= large_tiffs()
    found["header.npy"] = _npy(np.zeros((2, 2), np.uint8)).replace(
        b"(2, 2)", b"(99999999999, 9)"[:16]
    )
    found["long.npy"] = b"\x93NUMPY\x02\x00" + (60_000).to_bytes(4, "little") + b"(" * 60_000
    return found


def _flat_png(width: int, height: int, bits: int, colour: int) -> bytes:
    rows = zlib.compressobj(1)
    row = bytes(1 + (width * bits + 7) // 8)
    data = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    chunk = lambda kind, x: (
        struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x))
    )
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\0") if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + head + palette + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def large(folder: Path, rng: random.Random) -> tuple[str, Use]:
    name = rng.choice(sorted(large_images()))
    return f"{name}, large", _picture(folder / name, large_images()[name], rng, False)


# --- What is no regular file --------------------------------------------------------------

OTHER_FILES = (
    "pipe",
    "device",
    "socket",
    "folder",
    "loop",
    "dead link",
    "sparse",
    "empty",
    "zeros",
)


def _other_file(path: Path, kind: str) -> None:
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as end:
                place = os.getcwd()
                os.chdir(path.parent)  # the name of a socket must be short
                end.bind(path.name)
                os.chdir(place)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "dead link":
            path.symlink_to("nowhere")
        case "sparse":
            with path.open("wb") as file:
                file.truncate(1 << 40)
        case "empty":
            path.touch()
        case "zeros":
            path.write_bytes(bytes(2 << 20))


def other_files(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """A file that is none, in the place of any that is read."""
    kind = rng.choice(OTHER_FILES)
    readers: dict[str, Use] = {
        "a.jpg": lambda: decode({"image": str(folder / "a.jpg"), "name": "a"}, 3),
        "data/one/a.png": lambda: _all_of(f"folder:{folder}/data", "all"),
        "data/labels.csv": lambda: _all_of(f"folder:{folder}/data", "all"),
        "data/train.csv": lambda: _all_of(f"folder:{folder}/data", "train"),
        "data/train": lambda: _all_of(f"folder:{folder}/data", "train"),
        "data/one": lambda: _all_of(f"folder:{folder}/data", "all"),
        "data/classes.txt": lambda: _all_of(f"folder:{folder}/data/labels.csv", "all"),
        "names.txt": lambda: classes.read_names("classes", str(folder / "names.txt")),
        "w.npz": lambda: load_weights(folder / "w.npz"),
        "w.pth": lambda: load_weights(folder / "w.pth"),
        "hf/config.json": lambda: load_weights(folder / "hf"),
        "hf/preprocessor_config.json": lambda: load_weights(folder / "hf"),
        "hf/model.safetensors": lambda: load_weights(folder / "hf"),
        "hf/model.safetensors.index.json": lambda: load_weights(folder / "hf"),
        "hf/pytorch_model.bin": lambda: load_weights(folder / "hf"),
        "run/config.json": lambda: begin.model_of_workdir(folder / "run", "x"),
        "run/sweep.json": lambda: grid.read_record(tiny(), folder / "run"),
        "run/metrics.jsonl": lambda: metrics_file.read_metrics(folder / "run/metrics.jsonl"),
        "packed/dataset.json": lambda: catalog.load(f"records:{folder}/packed", "train"),
        "best/10/card/metadata": lambda: _card(folder / "best/10"),
        "best/10/digests/process_0": lambda: _card(folder / "best/10"),
        "best/10/state/_sharding": lambda: _whole(folder / "best/10"),
        "best/10/state/array_metadatas/process_0": lambda: _whole(folder / "best/10"),
        "best/10/state/manifest.ocdbt": lambda: _whole(folder / "best/10"),
        "best/10/_CHECKPOINT_METADATA": lambda: orbax_io.seconds_to_save(folder / "best/10"),
    }
    name = rng.choice(sorted(readers))
    _pictures(folder / "data")
    if "classes" in name or "labels" in name:
        (folder / "data/labels.csv").write_bytes(TABLES["labels.csv"])
    _huggingface(folder / "hf", bool(rng.randrange(2)))
    if "index" in name or "bin" in name:
        (folder / "hf/model.safetensors").unlink()
    (folder / "run/checkpoints/1").mkdir(parents=True)
    (folder / "packed").mkdir()
    shutil.copytree(checkpoint(), folder / "best/10")
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    _other_file(path, kind)

    def use() -> None:
        try:
            readers[name]()
        except OSError as error:
            if "run/" not in name or (told := of_system(error)) is None:
                raise
            raise told from error  # as the commands' common entry does

    return f"{kind} as {name}", use


# --- Tables of labels ---------------------------------------------------------------------

NAMES = [f"{i}.png" for i in range(6)]


def _csv(head: str, line: str, between: str = ",") -> bytes:
    """A table of `NAMES`; `line` is formatted with the name, its number, and small numbers."""
    rows = [line.format(name=n, i=i, two=i % 2, three=i % 3) for i, n in enumerate(NAMES)]
    return "\n".join([head, *rows, ""]).replace("|", between).encode()


TABLES = {
    "labels.csv": _csv("file_name|label|split", "{name}|cat{two}|train"),
    "labels.tsv": _csv("image|class", "{name}|{three}", "\t"),
    "metadata.jsonl": _csv("", '{{"file_name": "{name}", "label": "class {two}"}}'),
    "lists.jsonl": _csv("", '{{"file_name": "{name}", "labels": [{two}, 2]}}'),
    "hot.csv": _csv("id|cat|dog|owl", "{i}|{two}|1|0"),
    "several.csv": _csv("path|tags", "{name}|cat;dog{two}"),
    "train.csv": _csv("file_name|label", "{name}|{two}"),
}


def _pictures(folder: Path) -> None:
    for name in ("one/a.png", "two/b.png", *NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images()["bits.png"])


def _all_of(source: str, split: str, multi: str | None = None) -> None:
    """Opens a data set and reads every example; class numbers must be right."""
    opened = catalog.load(source, split, multi_label=multi)
    names = opened.class_names
    assert names, "no classes"
    assert len(set(names)) == len(names), "a class twice"
    for i in range(len(opened)):
        example = opened[i]
        label = np.asarray(example["label"])
        if label.ndim:
            assert label.shape == (len(names),)
        else:
            assert 0 <= label < len(names)
        decode(example, 3)
    fingerprint(opened)


def tables(folder: Path, rng: random.Random) -> tuple[str, Use]:
    name = rng.choice(sorted(TABLES))
    _pictures(folder)
    (folder / "one/a.png").unlink(), (folder / "two/b.png").unlink()
    (folder / "one").rmdir(), (folder / "two").rmdir()
    whole = rng.random() < 0.05
    data = TABLES[name] if whole else mutations.of_text(TABLES[name], rng)
    (folder / name).write_bytes(data)
    told = f"{name}{', whole' * whole}"
    if rng.random() < 0.15:
        text = mutations.of_text(b"cat\ndog\n", rng)
        (folder / "classes.txt").write_bytes(text)
        told, whole = f"{told}, classes.txt", False
    multi = rng.choice([None, None, "auto", "space", ";"])
    if whole:
        multi = "auto" if name.split(".")[0] in ("lists", "hot", "several") else None
    split = "train" if whole else rng.choice(["train", "test", "all", "train[:50%]"])

    def use() -> None:
        try:
            _all_of(f"folder:{folder}/{name}", split, multi)
        except UserError:
            assert not whole, "a whole table was refused"
            raise

    return told, use


def names(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """Lists of classes, of --classes and --class_names."""
    path = folder / "names.txt"
    path.write_bytes(mutations.of_text(b"cat\ndog\ntench, Tinca tinca\nn01440764 tench\n", rng))

    def use() -> None:
        found = classes.read_names("classes", str(path))
        assert found
        data = ("cat", "dog", "tench")
        classes.match(found, data, "the data", trust_order=bool(rng.randrange(2)))
        classes.chosen(str(path), found, data)

    return "names.txt", use


def packed(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """A packed data set whose description or labels are changed."""
    shutil.copytree(_packed(), folder, dirs_exist_ok=True)
    name = rng.choice(["dataset.json", "dataset.json", "train-labels.npy"])
    data = (folder / name).read_bytes()
    if name == "dataset.json":
        data = mutations.json_bytes(json.loads(data), rng)
    else:
        data = mutations.of_bytes(data, rng)
    (folder / name).write_bytes(data)
    return f"packed, {name}", lambda: _all_of(f"records:{folder}", "train")


@functools.cache
def _packed() -> Path:
    from vit_jax.data.sources import records

    folder = ROOM / "packed"
    folder.mkdir()
    example = lambda i: records.Packed(images()["bits.png"], i % 2, NAMES[i])
    split = records.write_split(folder, "train", map(example, range(6)), 6, 1)
    records.write_info(folder, ["cat", "dog"], {"train": split})
    return folder


# --- Weights ------------------------------------------------------------------------------

ROOM = Path()  # where materials are kept that are folders; `prepare` sets it


def prepare(room: Path) -> None:
    """Says where what is made once may lie."""
    global ROOM
    ROOM = room


@functools.cache
def networks() -> dict[str, Any]:
    small = {"depth": 1, "width": 8, "num_heads": 1, "mlp_dim": 8}
    return {"vit": model(**small), "beit": model(**small | BEIT)}


@functools.cache
def arrays() -> dict[str, dict[str, np.ndarray]]:
    """The arrays of small models, as several publishers name them."""
    vit, beit = networks()["vit"], networks()["beit"]
    google.write(ROOM / "google", *vit)
    huggingface.write(ROOM / "huggingface", *vit)
    return {
        "google": weight_files.read(ROOM / "google")[0],
        "timm": timm.state_dict(*vit),
        "timm_beit": timm.state_dict(*beit),
        "huggingface": weight_files.read(ROOM / "huggingface/model.safetensors")[0],
    }


@functools.cache
def weights() -> dict[str, bytes]:
    """Files of weights by their names."""
    found: dict[str, bytes] = {}
    arrays()
    found["google.npz"] = (ROOM / "google").read_bytes()
    file = io.BytesIO()
    np.savez_compressed(file, **arrays()["google"])
    found["compressed.npz"] = file.getvalue()
    timm.write(ROOM / "timm", *networks()["vit"], {"class_names": ("a", "b", "c", "d", "e")})
    found["timm.safetensors"] = (ROOM / "timm").read_bytes()
    found["model.safetensors"] = (ROOM / "huggingface/model.safetensors").read_bytes()
    found |= _torch_files()
    return found


def _torch_files() -> dict[str, bytes]:
    try:
        import torch
    except ImportError:
        return {}
    state = {name: torch.from_numpy(np.array(x)) for name, x in arrays()["timm"].items()}
    found = {}
    for name, new in (("zip.pth", True), ("old.pth", False)):
        file = io.BytesIO()
        torch.save({"model": state, "epoch": 3}, file, _use_new_zipfile_serialization=new)
        found[name] = file.getvalue()
    return found


def _loaded(path: Path, **said: Any) -> None:
    """Reads weights as every command does, up to the model that they make."""
    imported = load_weights(path, **said)
    found = trained.from_imported(trained.at_input_size(imported), None)
    for name, value in digests.named(found.params).items():
        assert np.isfinite(value).all(), f"{name} is not finite"
    assert len(found.class_names) == found.config.get("num_classes", len(found.class_names))


def whole_weight_files(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """Whole files with changed bytes, most of them where the structure is."""
    name = rng.choice(sorted(weights()))
    whole, path = weights()[name], folder / name
    untouched = rng.random() < 0.03
    if untouched:
        data = whole
    elif name.endswith(".safetensors"):
        data = _safetensors(whole, rng)
    else:
        data = mutations.of_bytes(whole, rng)
    path.write_bytes(data)
    heads = None if rng.randrange(2) and not untouched else 1

    def use() -> None:
        try:
            _loaded(path, num_heads=heads)
        except UserError:
            assert not untouched, "whole weights were refused"
            raise

    return f"{name}{', whole' * untouched}", use


def _safetensors(whole: bytes, rng: random.Random) -> bytes:
    """The header changed as a text, or as JSON with its length made right; or bytes."""
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length], whole[8 + length :]
    match rng.randrange(4):
        case 0:
            return mutations.of_bytes(whole[: 8 + length], rng) + data
        case 1:
            return mutations.of_bytes(whole, rng)
        case 2:
            header = mutations.of_text(header, rng)
        case 3:
            header = json.dumps(mutations.of_json(json.loads(header), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data


def weight_arrays(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """Arrays that are missing, renamed, misshapen, or of another type."""
    name = rng.choice(sorted(arrays()))
    changed = shuffled(arrays()[name], np.random.default_rng(rng.randrange(2**32)))
    key = rng.choice(sorted(changed))
    kind = rng.choice([None, None, np.float16, np.float64, np.int8, np.bool_, ">f4", "<u8"])
    if kind is not None:
        with np.errstate(all="ignore"):
            changed[key] = np.asarray(changed[key]).astype(kind)
    if rng.random() < 0.1:
        large = np.broadcast_to(np.float32(0), (1, rng.choice([50_000, 99_999, 100_000]), 8))
        changed[key] = large if rng.randrange(2) else large.reshape(-1, 2)[:3]
    path = folder / "w"
    weight_files.write_npz(path, changed)
    said = {
        "num_heads": rng.choice([None, 1, 3]),
        "image_size": rng.choice([None, None, (32, 32), (10**6, 8)]),
    }
    return f"arrays of {name}", lambda: _loaded(path, **said)


CONFIGS = {
    "processor": {
        "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2,
        "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "do_rescale": True, "rescale_factor": 1 / 255,
        "image_processor_type": "ViTImageProcessor",
    },
    "timm": {
        "architecture": "vit_base_patch16_224", "num_classes": 5, "num_features": 8,
        "global_pool": "token", "model_args": {"img_size": [32, 32]},
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9,
            "crop_mode": "center", "interpolation": "bicubic",
            "label_names": ["a", "b", "c", "d", "e"],
        },
    },
}  # fmt: skip


def _huggingface(folder: Path, by_timm: bool) -> None:
    folder.mkdir()
    arrays()
    weights()
    if by_timm:
        (folder / "model.safetensors").write_bytes((ROOM / "timm").read_bytes())
        (folder / "config.json").write_text(json.dumps(CONFIGS["timm"]))
        return
    shutil.copytree(ROOM / "huggingface", folder, dirs_exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(CONFIGS["processor"]))


def weight_folders(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """Folders of Hugging Face and timm whose settings are changed, or that are shards."""
    by_timm = rng.random() < 0.4
    _huggingface(folder / "hf", by_timm)
    name = rng.choice(
        ["config.json", "config.json", "preprocessor_config.json", "index", "beside"]
    )
    if by_timm or name == "beside":
        name = "config.json"
    if name == "index":
        os.rename(folder / "hf/model.safetensors", folder / "hf/a.safetensors")
        keys = arrays()["huggingface"]
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "a.safetensors")}
        (folder / "hf/model.safetensors.index.json").write_bytes(
            mutations.json_bytes(index, rng)
        )
    else:
        path = folder / "hf" / name
        path.write_bytes(mutations.json_bytes(json.loads(path.read_bytes()), rng))
    return f"{'timm' if by_timm else 'hf'}, {name}", lambda: _loaded(folder / "hf")


class _Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, call: Any, *given: Any) -> None:
        self.call, self.given = call, given

    def __reduce__(self) -> Any:
        return self.call, self.given


def traps(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """Pickles that would run code, and archives that unpack to a thousand times their size."""
    sprung, path = folder / "sprung", folder / rng.choice(["w.pth", "w.bin", "w.npz", "w.pkl"])
    code = rng.choice([
        _Code(os.mkdir, str(sprung)), _Code(os.system, f"mkdir '{sprung}'"),
        _Code(exec, f"import os; os.mkdir({str(sprung)!r})"),
        _Code(eval, f"__import__('os').mkdir({str(sprung)!r})"), _Code(Path.touch, sprung),
    ])  # fmt: skip
    value = rng.choice([code, {"model": code}, {"state_dict": {"a": [code]}}, {code.call: 1}])
    pickled = pickle.dumps(value, protocol=rng.choice([2, 2, 2, 4]))
    if rng.random() < 0.3:
        pickled = mutations.of_bytes(pickled, rng)
    how = rng.choice(["pickle", "zip", "npz", "bomb", "bomb", "old"])
    if how in ("pickle", "old"):
        path.write_bytes(
            pickled if how == "pickle" else weights().get("old.pth", b"")[:40] + pickled
        )
    elif how == "bomb":
        _bomb(path, rng.choice(["w/data.pkl", "a.npy", "a.npy"]), rng)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            if how == "zip":
                archive.writestr("z/data.pkl", pickled)
                archive.writestr("z/version", b"3\n")
            else:
                archive.writestr("a.npy", _npy(np.zeros(3)).replace(b"<f8", b"|O ") + pickled)

    def use() -> None:
        try:
            _loaded(path)
        finally:
            assert not sprung.exists(), "code of the file was run"

    return f"{how} as {path.name}", use


def _bomb(path: Path, name: str, rng: random.Random) -> None:
    size = 48 << 20
    header = _npy(np.zeros(2, np.float32))[:128].replace(b"(2,)", f"({size // 4},)".encode())[
        :128
    ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(name, "w") as member:
            member.write(header + bytes(size))
        for i in range(rng.choice([0, 0, 2000])):
            archive.writestr(f"{i}.npy", b"")
    if rng.random() < 0.3:  # what it declares is less than what it holds
        data = path.read_bytes()
        path.write_bytes(data.replace((size + 128).to_bytes(4, "little"), bytes([64, 1, 0, 0])))


# --- Work directories ---------------------------------------------------------------------


@functools.cache
def checkpoint() -> Path:
    """One of a small state, as training saves it."""
    bit_flips.make(ROOM / "workdir")
    return ROOM / "workdir/best" / str(bit_flips.OLD)


def _card(path: Path, read: Callable[[Path], Any] = orbax_io.card) -> Any:
    try:
        return read(path)
    except Damaged as damage:  # of which the commands make a sentence with its name
        raise UserError(f"checkpoint {path} is damaged ({damage})") from damage


def _whole(path: Path) -> None:
    _card(path, orbax_io.verify)


def cards(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """The parts of a checkpoint that are text: damaged ones must be noticed."""
    path = shutil.copytree(checkpoint(), folder / "best/10")
    whole = orbax_io.card(path)
    name = rng.choice(
        ["card/metadata", "digests/process_0", "_CHECKPOINT_METADATA", "state/_METADATA"]
    )
    value = json.loads((path / name).read_bytes())
    (path / name).write_bytes(mutations.json_bytes(value, rng))

    def use() -> None:
        orbax_io.seconds_to_save(path)
        assert _card(path) == whole, "another card came back"

    return name, use


@functools.cache
def _export_card() -> dict[str, Any]:
    cfg = {**configuration.to_dict(tiny()), "ema_decay": 0.0}
    return {"config": cfg, "class_names": [str(i) for i in range(10)], "step": 10, "score": 0.5}


def exports(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """A work directory of somebody who has made the digests fit a strange card."""
    path = folder / "best/10"
    for part in ("card", "state", "digests"):
        (path / part).mkdir(parents=True)
    card = _export_card() if rng.random() < 0.05 else mutations.of_json(_export_card(), rng)
    (path / "card/metadata").write_text(json.dumps(card))
    (path / "state/_METADATA").write_text("{}")
    digests.write(path / "digests", {}, card)
    mesh = sharding.make_mesh()
    return "export", lambda: trained.load(folder, "best", mesh)


def settings(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """`config.json` and `sweep.json` of a work directory."""
    (folder / "checkpoints/1").mkdir(parents=True)
    config = tiny()
    if rng.randrange(2):
        stored_config = configuration.to_dict(config)
        (folder / "config.json").write_bytes(mutations.json_bytes(stored_config, rng))
        return "config.json", lambda: begin.model_of_workdir(folder, "x")
    runs = {"lr=0.1": {"metrics": {"eval/accuracy": 0.5, "eval/loss": 1.0}}}
    record = {
        "config": configuration.to_dict(config),
        "runs": runs,
        "chosen": None,
        "final": None,
    }
    (folder / "sweep.json").write_bytes(mutations.json_bytes(record, rng))
    return "sweep.json", lambda: grid.read_record(config, folder)


def metrics(folder: Path, rng: random.Random) -> tuple[str, Use]:
    """`metrics.jsonl`: what a run goes on with is in order, and the good lines are there."""
    path = folder / "metrics.jsonl"
    records = [{"step": i, "loss": i / 7} for i in range(1, 30)]
    text = b"".join(map(metrics_file.encode, records))
    for _ in range(rng.randint(1, 3)):
        text = mutations.of_text(text, rng)
    path.write_bytes(text)
    step = rng.randrange(30)

    def use() -> None:
        metrics_file.read_metrics(path)
        found = metrics_file.find(path, step)
        metrics_file.go_on(path, step, found, None)
        after = metrics_file.read_metrics(path)
        steps = [record["step"] for record in after]
        assert steps == sorted(steps), "out of order"
        assert all(n <= step for n in steps), "later records"
        again = metrics_file.find(path, step)
        assert again.in_order, "not in order after it was mended"

    return "metrics.jsonl", use


KINDS: dict[str, tuple[Kind, int]] = {  # and how often they are drawn
    "images": (damaged_images, 320),
    "large images": (large, 12),
    "no regular files": (other_files, 60),
    "tables of labels": (tables, 150),
    "lists of classes": (names, 40),
    "packed data sets": (packed, 40),
    "files of weights": (whole_weight_files, 130),
    "arrays": (weight_arrays, 60),
    "folders of weights": (weight_folders, 70),
    "pickles and bombs": (traps, 30),
    "cards and digests": (cards, 25),
    "exports": (exports, 15),
    "settings of runs": (settings, 30),
    "metrics": (metrics, 25),
}
