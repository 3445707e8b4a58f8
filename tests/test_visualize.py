"""From a model and a folder of images to figures, numbers and one page."""

import io
import re

import jax
import numpy as np
import pytest
from PIL import Image

from tests.commands import assert_one_sentence, call, run
from tests.tiny_config import tiny
from vit_jax.analysis import figures
from vit_jax.checkpoints import trained
from vit_jax.distributed import sharding
from vit_jax.evaluation import inference
from vit_jax.models import registry
from vit_jax.system.errors import UserError

MESH = sharding.make_mesh(devices=jax.devices()[:4])
NAMES = ("cat & dog", "bird", "fish")


def random_model(class_names=NAMES, **fields):
    """A model with random weights in every array, the head too."""
    config = tiny(**fields)
    model = registry.build_model(config, len(class_names))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)
    params = jax.device_put(params, sharding.replicated(MESH))
    return trained.Trained(config, class_names, model, params, 7)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Grey and colour, none of them square or of the model's size."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for i in range(5):
        shape = (20 + i, 31, 3) if i % 2 else (33, 20 + i)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{i}.png")
    return folder


def draw(model, paths, output, **options):
    given = {"rollout": "residual", "topk": 2, "max_images": 8, "batch_size": 4}
    return figures.visualize(model, paths, output, mesh=MESH, **given | options)


def stems(folder, ending):
    return {path.stem for path in folder.glob(f"*{ending}")}


WHOLE = {"filters", "positions", "attention_distance", "rollout"}


def test_everything_for_a_wide_colour_model_with_registers(pictures, tmp_path, capsys):
    model = random_model(
        image_size=(12, 20),
        data={"channels": 3},
        model={"pool": "gap", "registers": 2, "posemb": "learned", "scan": True},
    )
    paths = inference.find_images([str(pictures)])
    assert draw(model, paths, tmp_path) == 0
    assert capsys.readouterr().out == f"9 figures and report.html in {tmp_path}\n"
    layers = {f"rollout_layers_{i}" for i in range(1, 6)}
    assert stems(tmp_path, ".png") == stems(tmp_path, ".npz") == WHOLE | layers
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    numbers = {path.stem: np.load(path) for path in tmp_path.glob("*.npz")}
    assert numbers["filters"]["filters"].shape == (28, 4, 4, 3)
    assert numbers["positions"]["similarity"].shape == (3, 5, 3, 5)
    assert numbers["attention_distance"]["distance"].shape == (2, 2)
    per_image = numbers["attention_distance"]["per_image"]
    assert per_image.shape == (5, 2, 2)
    np.testing.assert_allclose(
        numbers["attention_distance"]["distance"], per_image.mean(axis=0), rtol=1e-6
    )
    assert numbers["rollout"]["rollout"].shape == (5, 3, 5)
    assert list(numbers["rollout"]["names"]) == paths
    by_layer = numbers["rollout_layers_3"]["rollout"]
    assert by_layer.shape == (2, 3, 5)
    np.testing.assert_array_equal(by_layer[-1], numbers["rollout"]["rollout"][2])
    # The rest of what reaches the head is from the registers.
    assert (by_layer.sum(axis=(1, 2)) < 1).all()

    html = (tmp_path / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 9
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in html
    for text in ("cat &amp; dog", "3 x 5 of 4 pixels", "second hand", "not verified", paths[4]):
        assert text in html
    for path in tmp_path.glob("*.png"):
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            assert min(picture.size) > 100
            assert max(picture.size) <= 2000
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_predictions_and_rollout_do_not_depend_on_the_batch(pictures, tmp_path):
    model = random_model(model={"registers": 1})
    paths = inference.find_images([str(pictures)])
    together, failures = figures.look(model, paths, True, 8, MESH)
    assert failures == 0
    alone, _ = figures.look(model, paths[3:4], True, 4, MESH)
    for ours, other in zip(together[3], alone[0], strict=True):
        if isinstance(ours, str):
            assert ours == other
        else:
            np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-6)
    image = figures.as_seen(model, paths[3])
    assert (image.shape, image.dtype) == ((8, 8, 1), np.uint8)
    scaled = (image[None].astype(np.float32) - 127.5) / 127.5
    logits, _ = jax.jit(model.model.apply)(model.params, scaled)
    expected = jax.nn.softmax(logits)[0]
    np.testing.assert_allclose(together[3].probabilities, expected, atol=1e-5)
    best = figures.best(together[3].probabilities, NAMES, 2)
    assert [name for name, _ in best] == [NAMES[k] for k in np.argsort(-expected)[:2]]


def test_the_skip_connection_can_be_left_out(pictures, tmp_path):
    model, path = random_model(), str(pictures / "0.png")
    draw(model, [path], tmp_path, rollout="plain")
    assert "without the skip connection" in (tmp_path / "report.html").read_text()
    plain = np.load(tmp_path / "rollout.npz")["rollout"][0]
    (residual,), _ = figures.look(model, [path], True, 4, MESH)
    # The class token keeps at least a quarter of itself over two layers with the identity.
    assert residual.rollout[-1].sum() <= 0.75 < plain.sum()


def test_only_some_photos_are_drawn_but_all_are_averaged(pictures, tmp_path, monkeypatch):
    model, paths = random_model(), inference.find_images([str(pictures)])
    monkeypatch.setattr(figures, "DISTANCE_IMAGES", 3)
    draw(model, paths, tmp_path, max_images=2)
    assert np.load(tmp_path / "attention_distance.npz")["per_image"].shape[0] == 3
    assert list(np.load(tmp_path / "rollout.npz")["names"]) == [paths[0], paths[4]]
    assert "3 of the 5 images are used" in (tmp_path / "report.html").read_text()


def test_without_images_what_needs_none_is_drawn(tmp_path, capsys):
    draw(random_model(model={"posemb": "none", "relative": "keys"}), [], tmp_path)
    assert stems(tmp_path, ".png") == {"filters"}
    notes = capsys.readouterr().err
    assert "positions are not drawn: the model adds no position embeddings: where" in notes
    assert "attention is not drawn: pass images" in notes


def test_a_model_without_a_head_has_no_predictions(pictures, tmp_path):
    draw(random_model(class_names=()), [str(pictures / "1.png")], tmp_path)
    assert stems(tmp_path, ".png") == {*WHOLE, "rollout_layers_1"}
    assert "%" not in (tmp_path / "report.html").read_text().split("<h3>")[1]


def test_a_mixer_has_filters_and_predictions(pictures, tmp_path, capsys):
    shape = {"depth": 1, "width": 8, "mlp_dim": 8, "tokens_mlp_dim": 8}
    shape |= {"variant": "Mixer-S/4", "dropout": 0.0}
    draw(random_model(model=shape), [str(pictures / "1.png")], tmp_path)
    assert stems(tmp_path, ".png") == {"filters"}
    notes = capsys.readouterr().err
    assert "positions are not drawn: a Mixer has no position embeddings" in notes
    assert "attention is not drawn: a Mixer has none" in notes
    assert "cat &amp; dog" in (tmp_path / "report.html").read_text()


def test_a_resnet_without_images_has_nothing_to_draw(tmp_path):
    shape = {"variant": "R26x1", "resnet": (1,), "depth": None}
    shape |= {"dropout": 0.0, "stochastic_depth": 0.0}
    with pytest.raises(UserError, match=r"begin with patches.*a ResNet has none"):
        draw(random_model(model=shape), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_filters_on_feature_maps_have_no_colours():
    kernel = np.zeros((1, 1, 64, 8), np.float32)
    sentence = figures.draw_filters({"embedding": {"kernel": kernel}}, 3)
    assert "64 channels of a feature map" in sentence


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        draw(random_model(), [], tmp_path / "file" / "out")


def test_the_command_with_an_export_and_a_broken_image(pictures, tmp_path):
    trained.export(random_model(), tmp_path / "export")
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "0.png").read_bytes()[:80])
    output = tmp_path / "out"
    result = run(
        "visualize",
        f"--checkpoint={tmp_path / 'export'}",
        f"--output={output}",
        pictures,
        broken,
    )
    assert_one_sentence(result, "1 of 6 images could not be read")
    assert str(broken) in result.stderr
    assert stems(output, ".png") >= WHOLE
    assert np.load(output / "rollout.npz")["rollout"].shape == (5, 2, 2)
    assert (output / "report.html").stat().st_size > 10_000


def test_the_command_says_what_is_missing():
    assert_one_sentence(call("visualize", "--workdir=X"), "--output is missing")
