"""Masked patch prediction, against written-out targets and sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.models import registry
from vit_jax.models.resnet import ResNetConfig
from vit_jax.models.vit_config import ViTConfig
from vit_jax.objectives import masked_patches
from vit_jax.objectives.masked_patches import MaskedPatches
from vit_jax.objectives.objective import Carried
from vit_jax.system.errors import UserError

KEY = jax.random.key(0)
SHAPE = {"depth": 1, "width": 16, "mlp_dim": 24, "num_heads": 2, "num_classes": 0}


def objective(target="mean_colour", size=(16, 24), channels=3, **changes):
    cfg = ViTConfig(size, channels, 8, **SHAPE | changes)
    return MaskedPatches(registry.build(cfg), target)


def batch(size=(16, 24), channels=3, count=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size, channels), np.uint8)
    return {
        "pixels": jnp.asarray(pixels),
        "image": jnp.asarray(pixels / 127.5 - 1, jnp.float32),
    }


def test_half_are_corrupted_and_these_in_three_ways():
    found = masked_patches.corrupt(KEY, 400, 49, 0.5)
    predicted, masked, source = (np.asarray(x) for x in found)
    np.testing.assert_array_equal(predicted.sum(axis=1), round(0.5 * 49))
    swapped = source != np.arange(49)
    assert not (masked & ~predicted).any()
    assert not (swapped & (masked | ~predicted)).any()
    total = predicted.sum()
    # Binomial: three standard deviations of 0.4 % around the rates.
    assert masked.sum() / total == pytest.approx(0.8, abs=0.013)
    assert swapped.sum() / total == pytest.approx(0.1, abs=0.01)
    assert abs(predicted.mean(axis=0) - 24 / 49).max() < 0.1  # every place alike
    others = source[swapped]
    assert (np.bincount(others, minlength=49) > 0).all()


def test_colours_in_three_bits():
    colours = np.array([[0, 0, 0], [31.9, 32, 63], [255, 255, 255], [255, 0, 128]])
    expected = [0, 0 * 64 + 1 * 8 + 1, 511, 7 * 64 + 4]
    np.testing.assert_array_equal(masked_patches.quantise(jnp.asarray(colours)), expected)


@pytest.mark.parametrize("cells", [1, 4])
def test_targets_are_the_means_of_cells(cells):
    pixels = np.asarray(batch()["pixels"])
    found = masked_patches.colour_classes(jnp.asarray(pixels), 8, cells)
    edge = 8 // cells
    for i, n, cell in [(0, 0, 0), (1, 4, cells * cells - 1), (2, 5, cells - 1)]:
        top, left = 8 * (n // 3), 8 * (n % 3)
        row, column = divmod(cell, cells)
        y, x = top + edge * row, left + edge * column
        mean = pixels[i, y : y + edge, x : x + edge].astype(np.float64).mean(axis=(0, 1))
        levels = np.floor(mean / 32).astype(int)
        assert found[i, n, cell] == levels @ [64, 8, 1]


@pytest.mark.parametrize("target", masked_patches.TARGETS)
def test_the_loss_is_the_mean_over_corrupted_patches(target):
    """Recomputed from the model's own output, patch by patch, padding left out."""
    task, data = objective(target), batch()
    data["mask"] = jnp.array([1.0, 1.0, 0.0])
    params, extra = task.init(KEY)
    loss, metrics, _ = task.loss(params, Carried({}, {}, extra, 0), data, KEY)

    corruption = masked_patches.corrupt(jax.random.split(KEY)[0], 3, 6, 0.5)
    model, own = params["model"], params["objective"]

    def edit(tokens):
        tokens = np.array(tokens)
        edited = tokens.copy()
        for i in range(3):
            for n in range(6):
                masked = bool(corruption.masked[i, n])
                edited[i, n] = (
                    own["mask"][0, 0] if masked else tokens[i, corruption.source[i, n]]
                )
        return jnp.asarray(edited)

    _, out = task.model.apply(model, data["image"], edit_patches=edit)
    predictions = (
        np.asarray(out["encoded"])[:, 1:] @ own["head"]["kernel"] + own["head"]["bias"]
    )
    losses = []
    for i, n in np.argwhere(np.asarray(corruption.predicted)):
        if i == 2:
            continue
        y, x = 8 * (n // 3), 8 * (n % 3)
        if target == "pixels":
            patch = np.asarray(data["image"])[i, y : y + 8, x : x + 8].ravel()
            losses.append(((predictions[i, n] - patch) ** 2).mean())
            continue
        cells = 4 if target == "small_patch" else 1
        classes = masked_patches.colour_classes(data["pixels"], 8, cells)[i, n]
        logits = predictions[i, n].reshape(cells**2, 512)
        cross = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), classes)
        losses.append(float(cross.mean()))
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics["loss"][1]) == 2
    assert ("accuracy" in metrics) == (target != "pixels")


def test_what_is_masked_is_not_seen():
    """Changing a masked patch changes its target, and nothing that the encoder sees."""
    task, data = objective(), batch()
    params, _ = task.init(KEY)
    corruption = masked_patches.corrupt(jax.random.split(KEY)[0], 3, 6, 0.5)
    i, n = np.argwhere(np.asarray(corruption.masked))[0]
    users = (np.asarray(corruption.source[i]) == n) & ~np.asarray(corruption.masked[i])
    if users.any():  # a swapped patch shows it elsewhere
        pytest.fail("choose another key for this test")
    y, x = 8 * (n // 3), 8 * (n % 3)
    model, own = params["model"], params["objective"]

    def encoded(images):
        def edit(tokens):
            moved = jnp.take_along_axis(tokens, corruption.source[..., None], axis=1)
            return jnp.where(corruption.masked[..., None], own["mask"], moved)

        return task.model.apply(model, images, edit_patches=edit)[1]["encoded"]

    changed = data["image"].at[i, y : y + 8, x : x + 8].add(1.0)
    np.testing.assert_array_equal(encoded(changed), encoded(data["image"]))


def test_evaluation_corrupts_an_image_the_same_way_in_every_batch():
    task, data = objective(), batch(count=4)
    params, _ = task.init(KEY)
    losses = lambda rows: task.evaluate(
        params, Carried({}, {}, {}, 0), {k: v[rows] for k, v in data.items()}
    )["loss"]
    whole = losses(jnp.arange(4))
    parts = [losses(jnp.array(rows)) for rows in ([3], [1, 0], [2])]
    assert float(whole[0]) == pytest.approx(sum(float(x) for x, _ in parts), rel=1e-5)
    keys = jax.random.key_data(masked_patches.keys_of(data["pixels"]))
    assert len({tuple(map(int, key)) for key in keys}) == 4  # and no two images alike


@pytest.mark.parametrize("target", masked_patches.TARGETS)
def test_it_learns(target):
    task = objective(target, size=(16, 16), channels=1)
    data = batch((16, 16), 1, count=8)
    params, extra = task.init(KEY)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        carried = Carried({}, {}, extra, 0)
        loss, grads = jax.value_and_grad(lambda p: task.loss(p, carried, data, key).loss)(
            params
        )
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for i in range(60):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "colour"}, r"objective\.target is 'colour'"),
        ({"ratio": 0.0}, r"objective\.mask_ratio is 0\.0"),
        ({"ratio": 0.01}, "none of the 6 patches"),
        ({"model": registry.build(ResNetConfig((32, 32), 3, (), 1, 0))}, "needs a Vision Tran"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(objective(), **changes)


def test_small_patches_need_cells():
    with pytest.raises(UserError, match="6 pixels are no multiple"):
        MaskedPatches(registry.build(ViTConfig((12, 12), 3, 6, **SHAPE)), "small_patch")
