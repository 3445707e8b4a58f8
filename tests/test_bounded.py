import json
import os
import time

import numpy as np
import pytest

from vit_jax.data.decode import BadImage, decode
from vit_jax.data.sources import folder, label_files
from vit_jax.evaluation.embeddings import one_line
from vit_jax.interop import weight_files
from vit_jax.system import bounded
from vit_jax.system.errors import UserError


def odd_files(root):
    """A pipe, a link to a device, a link to that pipe, and 10 GB of nothing."""
    os.mkfifo(root / "pipe.png")
    (root / "device.png").symlink_to("/dev/zero")
    (root / "linked.png").symlink_to(root / "pipe.png")
    (root / "large.png").touch()
    os.truncate(root / "large.png", 10_000_000_000)
    return sorted(root.iterdir())


def test_what_is_no_image_file_is_a_bad_image_at_once(tmp_path):
    for path in odd_files(tmp_path):
        begin = time.monotonic()
        with pytest.raises(BadImage, match=r"pipe|device|bytes, more than"):
            decode({"image": str(path), "name": str(path)}, 3)
        assert time.monotonic() - begin < 5


def test_weights_are_regular_files(tmp_path):
    for path in odd_files(tmp_path):
        with pytest.raises(UserError, match=r"pipe|device|first bytes"):
            weight_files.read(path)


def test_brackets_without_end_are_a_mistake_like_others(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text("[" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"line 1 is no JSON object"):
        label_files.open_listed(label_files.listed_in_file(path), "train")
    with pytest.raises(ValueError, match="nested too deeply"):
        bounded.parse_json("[" * 200_000)


@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl"])
def test_a_line_of_labels_has_an_end(tmp_path, name):
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 10_000_000_000)
    with pytest.raises(UserError, match=r"line 1 has 1,048,576 characters or more"):
        label_files.open_listed(label_files.listed_in_file(tmp_path / name), "train")


def test_a_link_to_itself_is_no_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "a" / "itself").symlink_to(tmp_path / "a" / "itself")
    assert folder.open_folder(str(tmp_path), "all").class_names == ("a",)


def test_a_header_of_many_empty_arrays_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({str(i): entry for i in range(60_000)}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    monkeypatch.setattr(weight_files.json, "loads", lambda *a, **k: pytest.fail("it is parsed"))
    with pytest.raises(UserError, match=r"declares 60001 arrays or more"):
        weight_files.read(path)
    path.write_bytes((9 << 20).to_bytes(8, "little") + b"{" + b" " * (9 << 20))
    with pytest.raises(UserError, match=r"table of contents of 9437184 bytes"):
        weight_files.read(path)


def test_many_arrays_are_read_as_ever(tmp_path):
    arrays = {str(i): np.zeros(2, np.float32) for i in range(2000)}
    weight_files.write_safetensors(tmp_path / "x.safetensors", arrays)
    assert len(weight_files.read(tmp_path / "x.safetensors")[0]) == 2000


@pytest.mark.parametrize(
    "name", ["a\nb.png", "a\r\u2028\\n.png", "plain é 日.png", "\udcff\x85"]
)
def test_a_name_with_line_breaks_is_one_line_and_can_be_undone(name):
    line = one_line(name)
    assert len(f"{line}\n".splitlines()) == 1
    line.encode()
    assert line.encode("latin-1", "backslashreplace").decode("unicode_escape") == name
