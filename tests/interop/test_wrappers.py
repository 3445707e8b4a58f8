"""Under which words a file keeps its weights, and which of several are taken."""

import numpy as np
import pytest

from tests.interop.tiny_models import model, same
from vit_jax.interop import huggingface, timm, weight_files, wrappers
from vit_jax.interop.load import load_weights
from vit_jax.system.errors import UserError

CFG, PARAMS = model(gelu="erf")
STATE = timm.state_dict(CFG, PARAMS)
OTHER = {name: value + 1 for name, value in STATE.items()}
HEADLESS = {name: value for name, value in STATE.items() if not name.startswith("head.")}


def under(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def load(path, arrays, **options):
    weight_files.write_safetensors(
        path / "w", {name: np.array(x) for name, x in arrays.items()}
    )
    return load_weights(path / "w", num_heads=3, **options)


def assert_taken(found, state):
    head = found.params.get("head", {"bias": None})["bias"]
    if "head.bias" in state:
        np.testing.assert_array_equal(head, state["head.bias"])
    np.testing.assert_array_equal(
        found.params["embedding"]["bias"], state["patch_embed.proj.bias"]
    )


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "net.",
        "model.net.module.",
        "encoder.",
        "student.",
        "visual.trunk.",
        "a.b.c.d.",
        "model.teacher.backbone.",
    ],
)
def test_any_prefix_is_one(tmp_path, prefix):
    found = load(tmp_path, under(prefix))
    assert found.cfg == CFG
    same(found.params, PARAMS)
    assert not any("Left out" in note for note in found.notes)


@pytest.mark.parametrize(
    ("raw", "averaged"),
    [
        ("state_dict.", "state_dict_ema."),
        ("model.", "model_ema."),
        ("model.", "model_ema.module."),
        ("", "ema_model."),
        ("model.", "ema_model."),
        ("module.", "ema.module."),
        ("student.module.backbone.", "teacher.module.backbone."),
        ("params.", "params_ema."),
        ("encoder.", "target_encoder."),
        ("model.", "swa_model.module."),
    ],
)
def test_averaged_weights_are_taken_and_said(tmp_path, raw, averaged):
    arrays = under(raw) | under(averaged, OTHER)
    found = load(tmp_path, arrays)
    assert_taken(found, OTHER)
    note = next(note for note in found.notes if "--weights=raw" in note)
    assert repr(averaged.rstrip(".")) in note
    assert_taken(load(tmp_path, arrays, weights="ema"), OTHER)
    found = load(tmp_path, arrays, weights="raw")
    assert_taken(found, STATE)
    assert any("--weights=ema takes those" in note for note in found.notes)
    assert not any("Left out" in note for note in found.notes)


def test_moco_is_evaluated_by_its_base_encoder(tmp_path):
    projection = {"head.0.weight": np.ones((8, 24)), "head.1.bias": np.ones(8)}
    arrays = under("module.base_encoder.", HEADLESS | projection)
    arrays |= under("module.momentum_encoder.", {k: x + 1 for k, x in HEADLESS.items()})
    found = load(tmp_path, arrays | {"module.predictor.0.weight": np.ones((3, 3))})
    assert_taken(found, HEADLESS)
    assert found.family == "moco"
    notes = " ".join(found.notes)
    assert "--weights=ema takes those" in notes
    assert "Left out: 2 arrays, such as head.0.weight, of pre-training only" in notes
    assert "Left out: 1 arrays outside 'module.base_encoder.'" in notes
    averaged = load(tmp_path, arrays, weights="ema")
    np.testing.assert_array_equal(
        averaged.params["embedding"]["bias"], STATE["patch_embed.proj.bias"] + 1
    )


@pytest.mark.parametrize(
    ("weights", "prefix", "reason"),
    [
        ("ema", "model.", "no averaged weights: leave out --weights=ema"),
        ("raw", "model_ema.", "averaged weights alone: leave out --weights=raw"),
        ("mean", "", "--weights=mean: use one of raw, ema"),
    ],
)
def test_weights_that_are_not_there(tmp_path, weights, prefix, reason):
    with pytest.raises(UserError, match=reason):
        load(tmp_path, under(prefix), weights=weights)


def test_several_networks_are_not_one(tmp_path):
    with pytest.raises(UserError, match=r"2 networks, under 'image\.', 'query\.'"):
        load(tmp_path, under("image.") | under("query."))


def test_the_usual_words_come_first(tmp_path):
    found = load(tmp_path, under("best.", OTHER) | under("state_dict."))
    assert_taken(found, STATE)
    assert any("such as best." in note for note in found.notes)
    with pytest.raises(UserError, match="2 networks"):
        load(tmp_path, under("model.a.") | under("model.b."))


def test_words_about_what_is_left_out_are_true(tmp_path):
    heads = {"backbone.norm_of_mine": np.ones(3)}
    with pytest.raises(UserError, match="norm_of_mine is unknown"):
        load(tmp_path, under("backbone.") | heads)
    found = load(tmp_path, under("backbone.") | {"text.weight": np.ones(3)})
    note = next(note for note in found.notes if "Left out" in note)
    assert note == "Left out: 1 arrays outside 'backbone.', such as text.weight."
    found = load(tmp_path, under("backbone.") | {"head.mlp.0.weight": np.ones(3)})
    assert any("such as head.mlp.0.weight (a projection head)." in n for n in found.notes)
    found = load(tmp_path, under("backbone.", HEADLESS) | {"fc.weight": np.ones((5, 24))})
    assert any("such as fc.weight (a head outside the network)." in n for n in found.notes)


@pytest.mark.parametrize("own_numbers", [False, True])
def test_chunks_of_blocks(tmp_path, own_numbers):
    """`blocks.CHUNK.INDEX.`, of all blocks as DINOv2 counts, or of each chunk."""
    cfg, params = model(gelu="erf", depth=4, num_classes=0)
    chunked = {}
    for name, value in timm.state_dict(cfg, params).items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            inside = int(index) % 2 if own_numbers else index
            name = f"blocks.{int(index) // 2}.{inside}.{rest}"
        chunked[name] = value
    found = load(tmp_path, under("teacher.backbone.", chunked))
    assert found.cfg == cfg
    same(found.params, params)


def test_hugging_faces_names_under_other_words(tmp_path):
    huggingface.write(tmp_path / "folder", CFG, PARAMS)
    arrays, _ = weight_files.read(tmp_path / "folder" / "model.safetensors")
    found = load(tmp_path, under("model.", arrays))
    assert (found.cfg.num_classes, found.family) == (5, "huggingface")
    same(found.params, PARAMS)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on import
def test_dictionaries_in_dictionaries(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = lambda state: {k: torch.from_numpy(np.array(x)) for k, x in state.items()}
    optimizer = {"state": {0: {"exp_avg": torch.full((3,), float("nan"))}}, "groups": [1]}
    content = {
        "epoch": 3,
        "optimizer": optimizer,
        "run": {"model": tensors(under("module.")), "model_ema": tensors(OTHER)},
    }
    torch.save(content, tmp_path / "w.pth")
    found = load_weights(tmp_path / "w.pth", num_heads=3)
    assert_taken(found, OTHER)
    assert found.family == "deit"  # another dictionary around, as papers have it
    assert any("optimizer.state.0.exp_avg" in note for note in found.notes)
    content["itself"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"networks|damaged|two arrays"):
        load_weights(tmp_path / "w.pth", num_heads=3)


def test_a_prefix_says_whether_its_weights_are_averaged():
    for prefix in ("ema.", "model_ema.", "ema_model.", "teacher.backbone.", "x.encoder_k."):
        assert wrappers.averaged(prefix)
    for prefix in ("", "module.", "schema.", "premature.", "student.", "encoder_q."):
        assert not wrappers.averaged(prefix)
