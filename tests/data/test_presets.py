import ast
import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.data import recipes
from vit_jax.data.mixing import Mixing, mix
from vit_jax.data.transforms import augment
from vit_jax.data.transforms.language import parse_transform
from vit_jax.system.errors import UserError

# Layers, magnitude, alpha: appendix of arXiv 2106.10270.
PAPER = {
    "none": (0, 0, 0.0),
    "light1": (2, 0, 0.0),
    "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5),
    "strong2": (2, 20, 0.8),
}


def test_there_are_the_seven_of_augreg():
    assert {name: tuple(level) for name, level in recipes.AUGREG.items()} == PAPER


def test_a_preset_is_a_transform_and_an_alpha():
    assert recipes.augreg("medium1") == (
        "inception_crop(0.05, 1.0)|flip|randaugment(2, 15)",
        0.2,
    )
    assert recipes.augreg("none") == ("inception_crop(0.05, 1.0)|flip", 0.0)
    assert recipes.augreg("light1") == ("inception_crop(0.05, 1.0)|flip|randaugment(2, 0)", 0.0)


def test_quirks_are_passed_on(photo):
    transform, alpha = recipes.augreg("strong2", quirks=True)
    assert transform.endswith("|randaugment(2, 20, quirks=True)")
    assert alpha == 0.8
    assert "randaugment" not in recipes.augreg("none", quirks=True)[0]
    parse_transform(transform, (16, 16))(photo, np.random.default_rng(0))


def record(monkeypatch, table):
    """Makes the operations of a table leave images alone and note name and strength."""
    drawn = []

    def recording(name):
        return lambda image, v, rng: (drawn.append((name, v)), image)[1]

    ops = {name: recording(name) for name in getattr(augment, table)}
    monkeypatch.setattr(augment, table, ops)
    return drawn


@pytest.mark.parametrize("name", PAPER)
def test_operations_are_drawn_as_defined(photo, monkeypatch, name):
    """Two each, uniformly among 16, at the preset's strength; of `none` nothing."""
    layers, magnitude, _ = PAPER[name]
    drawn = record(monkeypatch, "OPS")
    transform = parse_transform(recipes.augreg(name)[0], (8, 8))
    small, rng = photo.resize((20, 16)), np.random.default_rng(0)
    for i in range(800):
        transform(small, rng)
        assert len(drawn) == layers * (i + 1)
    assert {v for _, v in drawn} == ({magnitude / 10} if layers else set())
    if layers:
        counts = collections.Counter(name for name, _ in drawn)
        chi_squared = sum((count - 100) ** 2 / 100 for count in counts.values())
        assert len(counts) == 16
        assert chi_squared < 37.7  # 99.9 % of 15 degrees of freedom


@pytest.mark.parametrize("name", PAPER)
def test_batches_are_mixed_as_defined(name):
    """Weights have the distribution of max(w, 1 - w), w from Beta(alpha, alpha)."""
    alpha = recipes.augreg(name)[1]
    keys = jax.random.split(jax.random.key(0), 3000)
    draw = lambda key: mix(key, jnp.zeros((2, 1, 1, 1)), jnp.eye(2), Mixing(alpha))[1][0, 0]
    weights = np.sort(np.asarray(jax.vmap(draw)(keys), np.float64))
    if not alpha:
        assert (weights == 1).all()
        return
    w = np.random.default_rng(0).beta(alpha, alpha, 400_000)
    expected = np.quantile(np.maximum(w, 1 - w), (np.arange(3000) + 0.5) / 3000)
    assert np.abs(weights - expected).mean() < 0.01


def test_light1_is_not_free_of_effect(photo):
    with_it, without = (
        parse_transform(recipes.augreg(name)[0], (32, 32)) for name in ("light1", "none")
    )
    changed = 0
    for seed in range(30):
        outs = [t(photo, np.random.default_rng(seed)) for t in (with_it, without)]
        changed += outs[0].tobytes() != outs[1].tobytes()
    assert changed > 20


def test_deits_operations_are_drawn_as_defined(photo, monkeypatch):
    """Of two draws half apply, uniformly among 15, at about magnitude 9."""
    drawn = record(monkeypatch, "TIMM_OPS")
    monkeypatch.setattr(augment, "INCREASING_OPS", {})
    recipe = recipes.RECIPES["deit"]
    transform, rng = parse_transform(recipe.transform, (8, 8)), np.random.default_rng(0)
    small = photo.resize((20, 16))
    for _ in range(1000):
        transform(small, rng)
    assert abs(len(drawn) - 1000) < 4 * math.sqrt(2000 / 4)
    assert len({name for name, _ in drawn}) == 15
    assert abs(np.median([v for _, v in drawn]) - 0.9) < 0.01
    assert recipe.mixing == Mixing(0.8, 1.0, 1.0, 0.5, "timm", binary_targets=False)


def test_deit3_mixes_like_deit_with_binary_targets():
    assert recipes.RECIPES["deit3"].mixing == Mixing(0.8, 1.0, 1.0, 0.5, "timm", True)


def arguments(transform):
    """{step: its arguments}, read without the code under test."""
    found = {}
    for step in transform.split("|"):
        name, inside = re.fullmatch(r"(\w+)(?:\((.*)\))?", step).groups()
        call = ast.parse(f"f({inside or ''})", mode="eval").body
        values = [ast.literal_eval(arg) for arg in call.args]
        found[name] = (*values, *(ast.literal_eval(k.value) for k in call.keywords))
    return found


def test_dinos_views_differ_in_blur_and_solarization():
    views = {
        name: arguments(recipes.RECIPES[f"dino_{name}"].transform)
        for name in ("global_1", "global_2", "local")
    }
    for name, scale, blur in [
        ("global_1", (0.4, 1.0), 1.0),
        ("global_2", (0.4, 1.0), 0.1),
        ("local", (0.05, 0.4), 0.5),
    ]:
        assert views[name]["random_resized_crop"] == scale
        assert views[name]["color_jitter"] == (0.4, 0.4, 0.2, 0.1, 0.8)
        assert views[name]["grayscale"] == (0.2,)
        assert views[name]["gaussian_blur"] == (blur,)
    assert views["global_2"]["solarize"] == (0.2,)
    assert "solarize" not in views["global_1"]
    assert "solarize" not in views["local"]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_run_and_the_generator_decides(photo, name, mode):
    image = photo.convert(mode)
    transform = parse_transform(recipes.RECIPES[name].transform, (24, 32))
    outs = [transform(image, np.random.default_rng(seed)) for seed in (0, 1, 0)]
    assert {(out.size, out.mode) for out in outs} == {((32, 24), mode)}
    assert outs[0].tobytes() == outs[2].tobytes() != outs[1].tobytes()


def test_an_unknown_name_is_explained():
    with pytest.raises(UserError, match=r"no augmentation 'medium' \(did you mean 'medium"):
        recipes.augreg("medium")
    with pytest.raises(UserError, match="use one of none, light1, light2, medium1, medium2"):
        recipes.augreg("x")
