import dataclasses

import jax
import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage

from tests.interop.tiny_models import model
from vit_jax.interop.families import expected_shapes, flatten
from vit_jax.models import vit
from vit_jax.models.resize_positions import (
    METHODS,
    _geometric_points,
    resize_embedding,
    resize_grid,
    resize_params,
    resize_relative,
)
from vit_jax.system.errors import UserError

GRIDS = [((14, 14), (24, 24)), ((14, 14), (7, 7)), ((14, 14), (7, 28)), ((3, 5), (4, 2)),
         ((7, 7), (14, 14)), ((2, 2), (1, 3)), ((1, 4), (3, 9))]  # fmt: skip


def table(grid, width=8, seed=0):
    return np.random.default_rng(seed).standard_normal((grid[0] * grid[1], width))


def test_corner_golden_values():
    expected = [[0, 0.5, 1, 1.5, 2], [1.5, 2, 2.5, 3, 3.5], [3, 3.5, 4, 4.5, 5],
                [4.5, 5, 5.5, 6, 6.5], [6, 6.5, 7, 7.5, 8]]  # fmt: skip
    found = resize_grid(np.arange(9.0)[:, None], (3, 3), (5, 5))
    np.testing.assert_allclose(found.reshape(5, 5), expected)
    found = resize_grid(np.arange(4.0)[:, None], (2, 2), (3, 3))
    np.testing.assert_allclose(found.reshape(3, 3), [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]])


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_corner_is_scipys_zoom_of_order_1(old, new):
    x = table(old)
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    expected = scipy.ndimage.zoom(x.reshape(*old, -1), zoom, order=1)
    np.testing.assert_allclose(
        resize_grid(x, old, new, "corner"), expected.reshape(new[0] * new[1], -1), atol=1e-6
    )


@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize(
    ("method", "theirs", "antialias"),
    [("half_pixel", "bilinear", False), ("bicubic_antialias", "bicubic", True)],
)
def test_centred_methods_are_those_of_jax_image(old, new, method, theirs, antialias):
    x = table(old).astype(np.float32)
    shape = (*new, x.shape[1])
    expected = jax.image.resize(x.reshape(*old, -1), shape, theirs, antialias=antialias)
    found = resize_grid(x, old, new, method)
    # They compute in float32; in float64 the comparison with torch below is exact.
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize("method", ["half_pixel", "bicubic", "bicubic_antialias"])
def test_centred_methods_are_those_of_torch(old, new, method):
    torch = pytest.importorskip("torch")
    x = table(old)
    image = torch.from_numpy(x.reshape(1, *old, -1)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        image,
        size=new,
        mode="bilinear" if method == "half_pixel" else "bicubic",
        antialias=method == "bicubic_antialias",
        align_corners=False,
    )
    found = resize_grid(x, old, new, method)
    np.testing.assert_allclose(
        found, expected.permute(0, 2, 3, 1).reshape(found.shape), atol=1e-10
    )


@pytest.mark.parity
def test_dinos_scale_is_torchs_scale_factor():
    torch = pytest.importorskip("torch")
    x = table((14, 14))
    image = torch.from_numpy(x.reshape(1, 14, 14, -1)).permute(0, 3, 1, 2)
    scale = (24.1 / 14, 16.1 / 14)
    expected = torch.nn.functional.interpolate(image, scale_factor=scale, mode="bicubic")
    found = resize_grid(x, (14, 14), (24, 16), "bicubic_dino")
    assert expected.shape[2:] == (24, 16)
    expected = expected.permute(0, 2, 3, 1).reshape(found.shape)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_constants_and_equal_grids_stay(method):
    ones = resize_grid(np.ones((15, 2)), (3, 5), (5, 9), method)
    np.testing.assert_allclose(ones, 1.0, atol=1e-12)
    x = table((3, 4))
    assert resize_grid(x, (3, 4), (3, 4), method) is x


@pytest.mark.parametrize(
    ("old", "new"), [((3, 3), (5, 4)), ((4, 5), (2, 3)), ((14, 14), (24, 24))]
)
def test_offsets_of_beit_keep_near_values_and_its_last_rows(old, new):
    """Splines through a geometric series: the middle stays, the edges reach the new edges."""
    rng = np.random.default_rng(0)
    size = lambda grid: (2 * grid[0] - 1, 2 * grid[1] - 1)
    (rows, columns), (new_rows, new_columns) = size(old), size(new)
    x = rng.standard_normal((rows * columns + 3, 2))
    for method in ("geometric", "geometric_cubic"):
        found = resize_relative(x, old, new, method)
        np.testing.assert_array_equal(found[-3:], x[-3:])
        grid, before = found[:-3].reshape(*size(new), 2), x[:-3].reshape(rows, columns, 2)
        # Offset 0 and, growing, +-1 are points of the series; corners are its ends.
        middle, centre = (new_rows // 2, new_columns // 2), (rows // 2, columns // 2)
        np.testing.assert_allclose(grid[middle], before[centre], atol=1e-12)
        if new > old:
            near, next_to = (middle[0] + 1, middle[1] - 1), (centre[0] + 1, centre[1] - 1)
            np.testing.assert_allclose(grid[near], before[next_to], atol=1e-12)
            np.testing.assert_allclose(grid[0, -1], before[0, -1], atol=1e-3)


def test_the_cubic_way_is_scipys_spline_on_the_grid():
    x = np.random.default_rng(0).standard_normal((27, 27))
    points = _geometric_points(27, 47)
    wanted = np.clip(np.arange(-23, 24), points[0], points[-1])
    expected = scipy.interpolate.RectBivariateSpline(points, points, x, s=0)(wanted, wanted)
    found = resize_grid(x.reshape(-1, 1), (27, 27), (47, 47), "geometric_cubic")
    np.testing.assert_allclose(found.reshape(47, 47), expected, atol=1e-10)


@pytest.mark.parametrize("posemb_at", ["stem", "layers", "shared"])
def test_every_layers_tables_are_resized(posemb_at):
    cfg, params = model(posemb_at=posemb_at, relative="bias")
    new = dataclasses.replace(cfg, image_size=(24, 40))
    resized = resize_params(params, cfg, new, "bicubic")
    shapes = {name: leaf.shape for name, leaf in flatten(resized).items()}
    assert shapes == expected_shapes(new)


def test_one_dimensional_relative_positions_cannot_be_resized():
    cfg, params = model(relative="keys")
    with pytest.raises(UserError, match="relative='keys'"):
        resize_params(params, cfg, dataclasses.replace(cfg, image_size=(24, 40)), "corner")


@pytest.mark.parametrize("first", [0, 1, 2, 5])
def test_rows_before_the_patches_stay(first):
    x = np.random.default_rng(0).standard_normal((1, first + 6, 4)).astype(np.float32)
    found = resize_embedding(x, (2, 3), (4, 4))
    assert found.shape == (1, first + 16, 4)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:, :first], x[:, :first])
    np.testing.assert_allclose(found[0, first:], resize_grid(x[0, first:], (2, 3), (4, 4)))


def test_errors():
    with pytest.raises(UserError, match=r"no way 'nearest' to resize.*corner"):
        resize_grid(table((2, 2)), (2, 2), (3, 3), "nearest")
    with pytest.raises(UserError, match=r"for 4 patches do not fill a grid of 2 x 3"):
        resize_grid(table((2, 2)), (2, 3), (3, 3))
    with pytest.raises(UserError, match="of 4 tokens are fewer than a grid of 2 x 3"):
        resize_embedding(table((2, 2))[None], (2, 3), (3, 3))


CFG = vit.ViTConfig((8, 12), 1, 4, 1, 8, 8, 2, num_classes=3)


@pytest.mark.parametrize("posemb", ["learned", "learned_2d", "sincos2d", "none"])
@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_resized_parameters_fit_the_new_model(posemb, pool):
    old = dataclasses.replace(CFG, posemb=posemb, pool=pool)
    new = dataclasses.replace(old, image_size=(16, 16))
    params = vit.build(old).init(jax.random.key(0))
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    found = resize_params(params, old, new)
    expected = jax.eval_shape(vit.build(new).init, jax.random.key(0))
    assert shapes(found) == shapes(expected)
    again = resize_params(params, old, dataclasses.replace(old, depth=1))
    assert again is params


def test_a_table_for_each_axis_is_resized_as_the_whole_table_would_be():
    old = dataclasses.replace(CFG, posemb="learned_2d", pool="gap")
    new = dataclasses.replace(old, image_size=(20, 16))
    params = vit.build(old).init(jax.random.key(0))

    def whole(cfg, params):
        x = params["Transformer"]["posembed_input"]
        rows, columns = cfg.grid
        shape = (rows, columns, 4)
        x, y = np.asarray(x["pos_embedding_x"]), np.asarray(x["pos_embedding_y"])[:, None]
        halves = [np.broadcast_to(half, shape) for half in (x, y)]
        return np.concatenate(halves, -1).reshape(rows * columns, -1)

    expected = resize_grid(whole(old, params), old.grid, new.grid)
    np.testing.assert_allclose(whole(new, resize_params(params, old, new)), expected, atol=1e-6)
