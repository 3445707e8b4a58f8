import json
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import decode
from vit_jax.data.sources import catalog
from vit_jax.system.errors import UserError

BUILDER = """
import io
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

def png(i):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), i, np.uint8)).save(file, "PNG")
    return file.getvalue()

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="fine")]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({
                "coarse": tfds.features.ClassLabel(num_classes=2),
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
            }),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(37), "test": self._generate_examples(5)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"coarse": 0, "image": png(i), "label": i % 3}
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A data set prepared elsewhere, whose builder this process does not know."""
    root = tmp_path_factory.mktemp("tfds")
    (root / "tiny.py").write_text(BUILDER)
    prepare = "import tiny; tiny.Tiny(data_dir='data', file_format='array_record')"
    command = [sys.executable, "-c", prepare + ".download_and_prepare()"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "data"


@pytest.fixture
def editable(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def greys(source):
    """What every image was painted with, which is its index at preparation."""
    return [np.asarray(decode.decode(source[i], 3))[0, 0, 0] for i in range(len(source))]


@pytest.mark.parametrize("name", ["tiny", "tiny/fine", "tiny:1.0.0", "tiny/fine:1.0.0"])
def test_a_prepared_set_is_read_by_name(prepared, name):
    source = catalog.load(f"tfds:{name}", "train", str(prepared))
    assert len(source) == 37
    assert sorted(greys(source)) == list(range(37))
    assert source.class_names == ("ant", "bee", "cat")


def test_images_stay_encoded_and_belong_to_their_labels(prepared):
    source = catalog.load("tfds:tiny", "test", str(prepared))
    assert source[0]["image"].startswith(b"\x89PNG")
    assert source[2]["name"] == "tfds:tiny test[2]"
    assert [source[i]["label"] for i in range(5)] == [g % 3 for g in greys(source)]


def test_neither_tensorflow_nor_the_builder_is_needed(prepared):
    source = catalog.load("tfds:tiny", "train", str(prepared))
    assert source[0]["label"] in range(3)
    assert "tensorflow" not in sys.modules
    assert "tiny" not in sys.modules


@pytest.mark.parametrize("path", ["tiny", "tiny/fine", "tiny/fine/1.0.0"])
def test_a_prepared_set_is_read_by_path(prepared, path):
    assert len(catalog.load(f"tfds:{prepared}/{path}", "test")) == 5


def test_the_environment_may_say_where_sets_lie(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(catalog.load("tfds:tiny", "test")) == 5


@pytest.mark.parametrize(
    "split",
    [
        "train[:33%]",
        "train[-3:]",
        "train[10:20]",
        "train[50%:]",
        "train[:1%]",
        "train[-20%:]",
        "train[:4%]+test",
    ],
)
def test_parts_are_those_tensorflow_datasets_would_take(prepared, split):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(prepared / "tiny/fine/1.0.0"))
    if split == "train[:1%]":  # 0.37 of an example: theirs is empty, ours an error
        with pytest.raises(UserError, match="holds no examples"):
            catalog.load("tfds:tiny", split, str(prepared))
        return
    theirs = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    ours = catalog.load("tfds:tiny", split, str(prepared))
    assert [e["image"] for e in theirs] == [ours[i]["image"] for i in range(len(ours))]


def test_sources_can_be_pickled(prepared):
    source = catalog.load("tfds:tiny", "train[5:]", str(prepared))
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_the_newest_version_is_taken(editable):
    newer = shutil.copytree(editable / "tiny/fine/1.0.0", editable / "tiny/fine/10.0.0")
    info = json.loads((newer / "dataset_info.json").read_text()) | {"version": "10.0.0"}
    (newer / "dataset_info.json").write_text(json.dumps(info))
    shutil.copytree(editable / "tiny/fine/1.0.0", editable / "tiny/fine/9.0.0")
    source = catalog.load("tfds:tiny", "test", str(editable))
    assert "10.0.0" in str(source.records.dataset_info.data_dir)


def test_several_configs_must_be_told_apart(editable):
    shutil.copytree(editable / "tiny/fine", editable / "tiny/other")
    with pytest.raises(UserError, match=r"several configs .*: fine, other"):
        catalog.load("tfds:tiny", "test", str(editable))


def test_an_unprepared_set_gets_the_command_at_once(tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        catalog.load("tfds:cifar10", "train", str(tmp_path))
    assert time.monotonic() - start < 5  # no download was tried
    assert f"tfds:cifar10 is not prepared under '{tmp_path}'" in str(caught.value)
    assert (
        f"pip install 'vit_jax[tfds]' && tfds build cifar10 --data_dir={tmp_path} "
        "--file_format=array_record"
    ) in str(caught.value)


def test_a_set_that_is_downloaded_by_hand_says_which_files(tmp_path):
    with pytest.raises(UserError) as caught:
        catalog.load("tfds:imagenet2012", "train", str(tmp_path))
    assert "--file_format=array_record --manual_dir=FOLDER`, where FOLDER" in str(caught.value)
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar" in str(caught.value)


def test_tfrecord_has_an_error_of_its_own(editable):
    path = editable / "tiny/fine/1.0.0/dataset_info.json"
    info = json.loads(path.read_text()) | {"fileFormat": "tfrecord"}
    path.write_text(json.dumps(info))
    for record in path.parent.glob("*.array_record*"):
        record.rename(str(record).replace("array_record", "tfrecord"))
    with pytest.raises(
        UserError, match=r"as tfrecord, which needs TensorFlow to read; prepare it"
    ):
        catalog.load("tfds:tiny", "train", str(editable))


def test_an_unknown_split_lists_those_that_exist(prepared):
    with pytest.raises(UserError, match="tfds:tiny has no split 'dev'; it has train, test"):
        catalog.load("tfds:tiny", "dev", str(prepared))


def test_the_splits_of_a_prepared_set_are_known(prepared):
    assert catalog.split_names("tfds:tiny", str(prepared)) == ("train", "test")


def test_a_path_without_a_prepared_set_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"nowhere' holds no prepared data set; give one with"):
        catalog.load(f"tfds:{tmp_path}/nowhere", "train")


@pytest.mark.parametrize("name", ["", "cifar 10", "a/b/c", "mnist:3"])
def test_a_name_that_is_none_is_explained(tmp_path, name):
    with pytest.raises(UserError, match="is not a data set name"):
        catalog.load(f"tfds:{name}", "train", str(tmp_path))


def test_a_set_without_labels_lists_its_features(editable):
    path = editable / "tiny/fine/1.0.0/features.json"
    spec = json.loads(path.read_text())
    for key in ("coarse", "label"):
        del spec["featuresDict"]["features"][key]
    path.write_text(json.dumps(spec))
    with pytest.raises(
        UserError, match="has features image and needs an Image and a ClassLabel"
    ):
        catalog.load("tfds:tiny", "train", str(editable))


def test_decoded_images_have_the_stored_size(prepared):
    image = decode.decode(catalog.load("tfds:tiny", "test", str(prepared))[0], 1)
    assert (image.size, image.mode) == ((5, 4), "L")
    assert isinstance(image, Image.Image)
