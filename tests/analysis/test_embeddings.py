"""Principal components against scikit-learn's; positions of every kind."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from tests.interop.tiny_models import model as tiny_model
from vit_jax.analysis import embeddings
from vit_jax.models import vit


@pytest.mark.parametrize(("shape", "count"), [((4, 4, 3, 64), 28), ((3, 3, 1, 6), 5)])
def test_components_are_those_of_scikit_learn(shape, count):
    rng = np.random.default_rng(0)
    scale = np.linspace(3.0, 0.1, np.prod(shape[:3])).reshape(*shape[:3], 1)
    kernel = (rng.standard_normal(shape) * scale + 1.0).astype(np.float32)
    found = embeddings.filter_components(kernel, count)
    pca = PCA(count, svd_solver="full").fit(kernel.astype(np.float64).reshape(-1, shape[3]).T)
    np.testing.assert_allclose(found.explained, pca.explained_variance_ratio_, rtol=1e-8)
    for ours, theirs in zip(found.filters, pca.components_, strict=True):
        ours = ours.ravel()
        np.testing.assert_allclose(ours, theirs * np.sign(ours @ theirs), atol=1e-8)
        assert ours[np.abs(ours).argmax()] > 0


def test_there_are_no_more_components_than_the_filters_span():
    rng = np.random.default_rng(0)
    few = embeddings.filter_components(rng.standard_normal((2, 2, 1, 64)), 28)
    assert few.filters.shape == (4, 2, 2, 1)
    assert few.explained.sum() == pytest.approx(1.0)
    narrow = embeddings.filter_components(rng.standard_normal((4, 4, 3, 8)), 28)
    assert narrow.filters.shape == (7, 4, 4, 3)
    assert narrow.explained.sum() == pytest.approx(1.0)


def test_learned_positions_are_the_rows_of_the_patches():
    cfg, params = tiny_model(image_size=(16, 32), registers=2, distillation="token")
    table = params["Transformer"]["posembed_input"]["pos_embedding"]
    assert table.shape == (1, 2 + 8, 24)
    found = embeddings.position_embeddings(cfg, params)
    np.testing.assert_array_equal(found, table[0, 2:].reshape(2, 4, 24))


def test_two_dimensional_positions_are_halves_for_column_and_row():
    cfg, params = tiny_model(image_size=(16, 32), posemb="learned_2d")
    learned = params["Transformer"]["posembed_input"]
    found = embeddings.position_embeddings(cfg, params)
    x, y = learned["pos_embedding_x"][3], learned["pos_embedding_y"][1]
    np.testing.assert_array_equal(found[1, 3], np.concatenate([x, y]))


@pytest.mark.parametrize("scan", [False, True])
def test_positions_of_every_layer_are_those_of_the_first(scan):
    cfg, params = tiny_model(posemb_at="layers", scan=scan)
    if scan:
        block = vit.unstack_layers(params)["Transformer"]["encoderblock_0"]
    else:
        block = params["Transformer"]["encoderblock_0"]
    table = np.asarray(block["posembed_input"]["pos_embedding"])
    found = embeddings.position_embeddings(cfg, params)
    np.testing.assert_array_equal(found, table[0, 1:].reshape(4, 4, 24))


def test_models_without_positions():
    assert embeddings.position_embeddings(*tiny_model(posemb="none")) is None


def test_similarity_of_sine_cosine_positions():
    cfg, params = tiny_model(image_size=(24, 40), posemb="sincos2d")
    table = embeddings.position_embeddings(cfg, params)
    similarity = embeddings.cosine_similarity(table)
    assert similarity.shape == (3, 5, 3, 5)
    # sin a sin b + cos a cos b = cos(a - b): the mean over both axes and all frequencies.
    omega = 10_000.0 ** -np.linspace(0.0, 1.0, 6)
    for i, j, k, m in [(0, 0, 2, 4), (1, 3, 1, 0), (2, 2, 0, 2)]:
        expected = (np.cos(omega * (i - k)) + np.cos(omega * (j - m))).mean() / 2
        assert similarity[i, j, k, m] == pytest.approx(expected, abs=1e-6)


def test_similarity_with_oneself_is_one_and_does_not_depend_on_length():
    table = np.random.default_rng(0).standard_normal((3, 2, 8))
    table[1, 1] = -5 * table[0, 0]
    table[2, 0] = 0.0
    similarity = embeddings.cosine_similarity(table)
    for i, j in [(0, 0), (0, 1), (1, 0), (2, 1)]:
        assert similarity[i, j, i, j] == pytest.approx(1.0)
    assert similarity[0, 0, 1, 1] == pytest.approx(-1.0)
    np.testing.assert_array_equal(similarity[2, 0], np.zeros((3, 2)))
    np.testing.assert_allclose(similarity, similarity.transpose(2, 3, 0, 1))
