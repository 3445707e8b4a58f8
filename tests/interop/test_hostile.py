"""Files made to mislead: each is one sentence, runs nothing and takes no memory."""

import io
import json
import os
import pickle
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from tests.interop.tiny_models import model
from vit_jax.interop import google, huggingface, timm, weight_files
from vit_jax.interop.load import load_weights
from vit_jax.system.errors import UserError


def refused(path, match, load=weight_files.read):
    """Asserts one sentence that names the file, and that hardly any memory was taken."""
    tracemalloc.start()
    with pytest.raises(UserError, match=match) as error:
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"GIF89a" + bytes(100), "not an .npz, .safetensors or PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "damaged"),
        (b"<html>not found</html>", "not an .npz"),
        (b"\x93NUMPY\x01\x00" + bytes(50), "not an .npz"),
        (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
        (b"\x02" + bytes(7) + b"{}", "no arrays"),
        (b"\x90\x00\x00\x00\x00\x00\x00\x00" + b"{" * 0x90, "damaged"),
    ],
)
def test_not_a_file_of_weights(tmp_path, content, match):
    (tmp_path / "w.npz").write_bytes(content)
    refused(tmp_path / "w.npz", match)


def test_nothing_there_and_a_folder(tmp_path):
    refused(tmp_path / "w.npz", "there is no file")
    refused(tmp_path, "is a folder")
    refused(tmp_path, "no weights", load_weights)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, kind, keep):
    write = weight_files.write_npz if kind == "npz" else weight_files.write_safetensors
    write(tmp_path / "w", {"a": np.ones((10, 10)), "b": np.ones(5)})
    data = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(data[: int(len(data) * keep)])
    refused(tmp_path / "w", "damaged|bytes|not an|offsets")


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(tmp_path, kind, value):
    write = weight_files.write_npz if kind == "npz" else weight_files.write_safetensors
    write(tmp_path / "w", {"fine": np.ones(3), "spoilt": np.array([1, value], np.float32)})
    refused(tmp_path / "w", r"NaN or infinite numbers \(in float32\) in array 'spoilt'")


def test_numbers_that_float32_cannot_hold(tmp_path):
    cfg, params = model()
    arrays = {"head/bias": np.full(5, 1e300)}
    google.write(tmp_path / "w", cfg, params)
    weight_files.write_npz(tmp_path / "w", weight_files.read(tmp_path / "w")[0] | arrays)
    refused(tmp_path / "w", "float32.*head/bias", load_weights)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on import
def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    trap = tmp_path / "trapped"
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"model": Trap(trap)}, protocol=2))
    pytest.importorskip("torch")
    refused(tmp_path / "w.pt", "could run code|damaged")
    archive(
        tmp_path / "z.pt",
        [("z/data.pkl", pickle.dumps(Trap(trap), protocol=2)), ("z/version", b"3\n")],
    )
    refused(tmp_path / "z.pt", "could run code|damaged")
    data = np.array([Trap(trap)], dtype=object)
    archive(tmp_path / "w.npz", [("a.npy", npy(data))])
    refused(tmp_path / "w.npz", "Python objects, which could run code")
    assert not trap.exists()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on import
def test_a_tensor_that_is_one_number_and_claims_to_be_many(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "would unpack")
    torch.save([1, 2], tmp_path / "l.pt")
    refused(tmp_path / "l.pt", "a list, not a state_dict")


@pytest.mark.parametrize("name", ["../../etc/a.npy", "/a.npy", "a\\..\\b.npy", "x/../y.npy"])
def test_paths_out_of_the_archive(tmp_path, name):
    refused(archive(tmp_path / "w", [(name, npy(np.ones(3)))]), "path out of the archive")


def test_members_that_are_no_arrays(tmp_path):
    refused(archive(tmp_path / "a", [("run.py", b"print(1)")]), "not an array")
    refused(archive(tmp_path / "b", [("run.npy", b"print(1)" * 9)]), "not an array")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile notices, too
        twice = archive(tmp_path / "c", [("a.npy", npy(np.ones(3)))] * 2)
    refused(twice, "two arrays named 'a'")


def test_a_zip_bomb(tmp_path):
    bomb = npy(np.zeros(1, np.float32))[:128]
    header = bomb.replace(b"(1,)", b"(67108864,)")[:128]
    pieces = zipfile.ZipFile(tmp_path / "w", "w", zipfile.ZIP_DEFLATED)
    with pieces, pieces.open("a.npy", "w") as member:
        member.write(header)
        for _ in range(64):
            member.write(bytes(4 << 20))
    assert (tmp_path / "w").stat().st_size < 1 << 20
    refused(tmp_path / "w", "would unpack from")


def with_shape(text, length=None):
    raw = npy(np.zeros((2, 3), np.float32))
    raw = raw.replace(b"(2, 3)", text)
    return raw if length is None else raw[:8] + length.to_bytes(2, "little") + raw[10:]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (with_shape(b"(2000000000, 3000000000)"), "header|shape"),
        (with_shape(b"(-2, 3)"), "not understood"),
        (with_shape(b"(2, 4)"), r"shape \(2, 4\), but 24 bytes"),
        (with_shape(b"(0x2, 3)"), "not understood"),
        (with_shape(b"(__import__('os'), 3)"), "not understood|header"),
        (with_shape(b"(2, 3)", 60_000), "header of 60000 bytes"),
        (with_shape(b"(2, 3)").replace(b"<f4", b"<c8"), "type '<c8'"),
        (with_shape(b"(2, 3)").replace(b"<f4", b"<M8"), "type '<M8'"),
        (with_shape(b"(2, 3)").replace(b"NUMPY\x01", b"NUMPY\x07"), "not an array"),
    ],
)
def test_headers_of_npy(tmp_path, data, match):
    refused(archive(tmp_path / "w", [("a.npy", data)]), match)


def entry(**changes):
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(data_offsets=[0, 2400], shape=[20, 30])}, "offsets"),
        ({"a": entry(data_offsets=[4, 28])}, "offsets"),
        ({"a": entry(data_offsets=[-24, 0])}, "offsets"),
        ({"a": entry(shape=[2, 4])}, "offsets"),
        ({"a": entry(shape=[10**12, 10**12])}, "offsets"),
        ({"a": entry(shape=[-2, -3])}, "shape"),
        ({"a": entry(shape=[True, 6])}, "shape"),
        ({"a": entry(shape=[2.0, 3])}, "shape"),
        ({"a": entry(shape=None)}, "damaged"),
        ({"a": entry(dtype="F8_E4M3")}, "type 'F8_E4M3'"),
        ({"a": entry(), "b": entry()}, "offsets"),
        ({"a": 3}, "damaged"),
        ([1], "first bytes"),
        ({}, "no arrays|24 bytes"),
        (b'{"a": {}, "a": {}}', "same name"),
        (b"{" + b"[" * 100_000, "damaged"),
        ({"a": entry(shape=[2, 1], data_offsets=[0, 8])}, "24 bytes of data"),
        ({"__metadata__": {"a": "b"}}, "24 bytes of data"),
    ],
)
def test_headers_of_safetensors(tmp_path, header, match):
    refused(safetensors(tmp_path / "w", header, bytes(24)), match)


@pytest.mark.parametrize("axis", [0, -1])
def test_an_array_ten_times_too_large(tmp_path, axis):
    """Every array in turn: never an error of another kind, always its name."""
    cfg, params = model(depth=1)
    google.write(tmp_path / "w", cfg, params)
    arrays, _ = weight_files.read(tmp_path / "w")
    for name, value in arrays.items():
        weight_files.write_npz(
            tmp_path / "x", arrays | {name: np.concatenate([value] * 10, axis)}
        )
        with pytest.raises(UserError) as error:
            load_weights(tmp_path / "x")
        assert str(tmp_path / "x") in str(error.value)


def mutations(data, count, seed):
    """Random damage: bytes changed, cut out, put in, copied elsewhere, and a cut end."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            at, length = int(rng.integers(len(changed))), int(rng.integers(1, 9))
            match rng.integers(6):
                case 0 | 1:
                    changed[at] = rng.integers(256)
                case 2:
                    del changed[at : at + length]
                case 3:
                    changed[at:at] = rng.bytes(length)
                case 4:
                    changed[at:at] = changed[:length] if at % 2 else changed[-length:]
                case 5:
                    changed[at : at + 1] = bytes([changed[at] ^ (1 << rng.integers(8))])
        yield bytes(changed)


def attempt(load, path):
    """What `load` returns, or None after a `UserError`; any other error is a failure."""
    try:
        return load(path)
    except UserError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message
    return None


ARRAYS = {"a/b": np.ones((2, 3), np.float32), "c": np.arange(4.0), "d": np.ones((), np.int32)}


@pytest.mark.parametrize("kind", ["npz", "compressed", "safetensors"])
def test_damaged_files_are_read_right_or_refused(tmp_path, kind):
    path = tmp_path / "w"
    if kind == "safetensors":
        weight_files.write_safetensors(path, ARRAYS)
    else:
        with path.open("wb") as file:
            (np.savez if kind == "npz" else np.savez_compressed)(file, **ARRAYS)
    shapes = sorted(value.shape for value in ARRAYS.values())
    read = 0
    for data in mutations(path.read_bytes(), 4000, seed=len(kind)):
        path.write_bytes(data)
        if arrays := attempt(lambda path: weight_files.read(path)[0], path):
            assert sorted(value.shape for value in arrays.values()) == shapes
            read += 1
    assert 0 < read < 4000


@pytest.mark.parametrize("kind", ["google", "timm"])
def test_damaged_models_are_read_right_or_refused(tmp_path, kind):
    cfg, params = model(depth=1, width=8, num_heads=1, mlp_dim=8)
    path = tmp_path / "w"
    write = google.write if kind == "google" else timm.write
    write(path, cfg, params)
    data = path.read_bytes()
    # The header is where the structure is, and the random damage would mostly miss it.
    length = 8 + int.from_bytes(data[:8], "little") if kind == "timm" else len(data)
    for changed in mutations(data[:length], 400, seed=1):
        path.write_bytes(changed + data[length:])
        if found := attempt(lambda path: load_weights(path, num_heads=1), path):
            assert found.cfg.width == cfg.width


def shuffled(arrays, rng):
    """A dict of arrays with some taken out, renamed, reshaped, emptied or of another type."""
    arrays, names = dict(arrays), sorted(arrays)
    for name in rng.choice(names, rng.integers(1, 4), replace=False):
        value = arrays.pop(name)
        match rng.integers(8):
            case 0:
                continue
            case 1:
                name = str(rng.choice(["", "params/", "module.", "vit.", "opt/target/"])) + name
            case 2:
                value = value.reshape(-1)
            case 3:
                value = value[None]
            case 4:
                value = value[:0]
            case 5:
                value = np.zeros(rng.integers(0, 6, rng.integers(0, 5)))
            case 6:
                value = value.T
            case 7:
                name = str(rng.choice(names))
        arrays[str(name)] = value
    return arrays


BEIT = {
    "relative": "bias",
    "key_bias": False,
    "posemb": "none",
    "pool": "gap",
    "class_token": True,
    "final_norm": "pooled",
    "layer_scale_init": 0.1,
}
KINDS = {
    "google": {},
    "timm": {},
    "registers": {"registers": 2, "layer_scale_init": 0.1},
    "map": {"pool": "map"},
    "beit": BEIT,
    "swiglu": {"mlp": "swiglu", "layer_scale_init": 0.1},
    "distilled": {"distillation": "heads"},
    "huggingface": {},
    "huggingface_beit": BEIT,
    "huggingface_dinov2": {
        "mlp": "swiglu",
        "mlp_dim": 48,
        "layer_scale_init": 0.1,
        "pool": "cls_gap",
        "registers": 2,
    },
    "huggingface_deit": {"distillation": "heads"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_wrong_array_is_a_sentence(tmp_path, kind):
    cfg, params = model(depth=1, **KINDS[kind])
    if kind == "google":
        google.write(tmp_path / "w", cfg, params)
        arrays, _ = weight_files.read(tmp_path / "w")
    elif kind.startswith("huggingface"):
        huggingface.write(tmp_path, cfg, params)
        arrays, _ = weight_files.read(tmp_path / "model.safetensors")
        (tmp_path / "config.json").unlink()
    else:
        arrays = timm.state_dict(cfg, params)
    rng = np.random.default_rng(0)
    path = tmp_path / "w"
    for _ in range(200):
        weight_files.write_npz(path, shuffled(arrays, rng))
        attempt(lambda path: load_weights(path, num_heads=3), path)
