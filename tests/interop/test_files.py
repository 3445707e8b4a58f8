"""Reading and writing arrays: every format, every type of number."""

import argparse
import json
import zipfile

import ml_dtypes
import numpy as np
import pytest

from vit_jax.interop import weight_files
from vit_jax.system.errors import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)
ARRAYS = {
    "a/b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.arange(4, dtype=np.float16),
    "brain": np.arange(4).astype(BF16),
    "double": np.arange(3.0),
    "scalar": np.array(7, np.float32),
    "step": np.array(3),
    "empty": np.zeros((0, 4), np.float32),
}
WRITERS = {"npz": weight_files.write_npz, "safetensors": weight_files.write_safetensors}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype, name
        assert found[name].shape == expected[name].shape, name
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written_is_read_under_any_name(tmp_path, kind):
    WRITERS[kind](tmp_path / "weights.dat", ARRAYS)
    arrays, found = weight_files.read(tmp_path / "weights.dat")
    assert found == kind
    assert_equal(arrays, ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.dat"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpys_own_archives(tmp_path, save):
    arrays = ARRAYS | {
        "fortran": np.asfortranarray(ARRAYS["a/b"]),
        "big": np.arange(3, dtype=">f4"),
    }
    save(tmp_path / "w.npz", **arrays)
    assert_equal(weight_files.read(tmp_path / "w.npz")[0], arrays)


def test_others_read_our_safetensors_and_we_theirs(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    weight_files.write_safetensors(tmp_path / "ours", ARRAYS)
    assert_equal(library.load_file(tmp_path / "ours"), ARRAYS)
    library.save_file(ARRAYS, tmp_path / "theirs")
    assert_equal(weight_files.read(tmp_path / "theirs")[0], ARRAYS)


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    weight_files.write_npz(tmp_path / "w.npz", {"a": np.ones(3)})
    before = (tmp_path / "w.npz").read_bytes()
    with pytest.raises(ValueError, match="pickle"):
        weight_files.write_npz(tmp_path / "w.npz", {"a": np.array([object()])})
    assert (tmp_path / "w.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot write"):
        weight_files.write_npz(tmp_path / "w.npz" / "below", {"a": np.ones(3)})


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on import
@pytest.mark.parametrize("wrap", [None, "model", "state_dict", "teacher"])
def test_pytorch_files(tmp_path, wrap):
    torch = pytest.importorskip("torch")
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    content = {wrap: state, "epoch": 3} if wrap else state
    for name, new in (("new", True), ("old", False)):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=new)
        arrays, kind = weight_files.read(tmp_path / name)
        assert kind == ("wrapped" if wrap else "torch")
        expected = np.arange(6, dtype=np.float32).reshape(2, 3).T
        assert_equal(arrays, {"a": expected, "b": np.ones(2, np.float32)})


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on import
def test_the_command_line_that_dino_keeps_beside_its_weights(tmp_path):
    torch = pytest.importorskip("torch")
    args = argparse.Namespace(lr=0.1, data="imagenet", local_crops=[0.05, 0.4])
    torch.save({"model": {"a": torch.ones(2)}, "args": args}, tmp_path / "w.pth")
    assert_equal(weight_files.read(tmp_path / "w.pth")[0], {"a": np.ones(2, np.float32)})


def test_without_pytorch_the_message_says_what_to_do(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}.")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"vit_jax\[parity\].*safetensors"):
        weight_files.read(tmp_path / "w.pt")


def test_the_header_of_our_safetensors_is_what_loaders_of_pytorch_want(tmp_path):
    weight_files.write_safetensors(tmp_path / "w", ARRAYS)
    raw = (tmp_path / "w").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}
