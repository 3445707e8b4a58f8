import pytest

from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as part:
        assert part.suffix == ".txt"
        part.write_text("done")
        assert not path.exists()
    assert path.read_text() == "done"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_was_there_is_replaced_as_a_whole_or_stays(tmp_path, folder):
    path = tmp_path / "thing"

    def fill(place, text):
        if folder:
            place.mkdir()
            (place / text).write_text(text)
        else:
            place.write_text(text)

    def content():
        return [p.name for p in path.iterdir()] if folder else [path.read_text()]

    fill(path, "before")

    def fail():
        with replacing(path) as part:
            fill(part, "half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert content() == ["before"]
    with replacing(path) as part:
        fill(part, "after")
    assert content() == ["after"]
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_a_folder_is_not_lost_to_a_file(tmp_path):
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "kept").touch()
    with (
        pytest.raises(
            UserError, match=r"cannot write .*thing: a folder is there: move it away"
        ),
        replacing(tmp_path / "thing") as part,
    ):
        part.touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["thing", "kept"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot write .*inside"),
        replacing(tmp_path / "file" / "inside"),
    ):
        pass
