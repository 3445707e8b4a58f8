import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from vit_jax.data import pipeline
from vit_jax.data.sources import catalog
from vit_jax.data.transforms import language
from vit_jax.distributed import sharding
from vit_jax.evaluation import features, few_shot, knn, linear_probe
from vit_jax.evaluation.features import Features, Rows, extract, make_feature_step, read_labels
from vit_jax.models import vit
from vit_jax.system.errors import UserError


def pixels(split):
    """The 64 grey levels of each digit as its features; some of them never vary."""
    source = catalog.load("digits", split)
    return Features(np.float32(source.images.reshape(len(source), -1)), np.int32(source.labels))


@pytest.fixture(scope="module")
def digits():
    return pixels("train"), pixels("test")


# --- Features -----------------------------------------------------------------------------


def test_features_are_the_pre_logits_of_every_example_once_and_in_order():
    config = vit.ViTConfig(
        image_size=(8, 8),
        channels=1,
        patch_size=4,
        depth=1,
        width=16,
        mlp_dim=32,
        num_heads=2,
        num_classes=4,
        representation_size=12,
        dtype="bfloat16",
    )
    model, mesh = vit.build(config), sharding.make_mesh()
    params = jax.jit(model.init)(jax.random.key(0))
    source = catalog.load("digits", "test[:83]")
    prepare = lambda batch, key: {
        **batch,
        "image": language.normalize(batch["image"], "inception"),
    }
    step = make_feature_step(model, prepare, mesh)
    transform = language.parse_transform("resize", (8, 8))
    with pipeline.eval_batches(
        source, transform=transform, channels=1, batch_size=16
    ) as batches:
        on_device = (sharding.put_batch(batch, mesh) for batch in batches)
        found = extract(lambda batch: step(params, batch), on_device)
    images = jnp.stack([source[i]["image"] for i in range(83)])[..., None] / 127.5 - 1
    expected = jax.jit(model.apply)(params, images)[1]["pre_logits"]
    assert (found.values.shape, found.values.dtype) == ((83, 12), np.float32)
    np.testing.assert_allclose(found.values, np.float32(expected), atol=0.02)  # bfloat16
    np.testing.assert_array_equal(found.labels, [source[i]["label"] for i in range(83)])


def test_features_that_are_not_finite_are_refused():
    batch = np.array([[1.0], [np.nan]], np.float32), np.zeros(2, np.int32), np.ones(2)
    with pytest.raises(UserError, match="features hold NaN"):
        extract(lambda batch: batch, [batch])


# --- Which images -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_one_generator_permutes_the_classes_in_order(seed):
    labels = np.array([1, 0, 0, 3, 1, 0, -1, 1, 1, 0, 3])  # of four classes; none of class 2
    rng = np.random.default_rng(seed)
    expected = [
        *rng.permutation([1, 2, 5, 9])[:3],
        *rng.permutation([0, 4, 7, 8])[:3],
        *rng.permutation([3, 10]),  # all there are
    ]
    assert few_shot.choose_shots(labels, 4, 3, seed).tolist() == expected


def test_subsets_are_rows_of_one_set_of_images(digits):
    labels = digits[0].labels
    subsets = few_shot.choose_subsets(labels, 10, (1, 5, 10), (3, 4))
    for shots in (1, 5, 10):
        for seed, rows in zip((3, 4), subsets.rows[shots], strict=True):
            chosen = subsets.indices[rows]
            assert chosen.tolist() == few_shot.choose_shots(labels, 10, shots, seed).tolist()
            assert np.bincount(labels[chosen]).tolist() == [shots] * 10
    # Fewer shots are among more of the same seed, so nothing else is read.
    largest = np.concatenate([few_shot.choose_shots(labels, 10, 10, s) for s in (3, 4)])
    assert subsets.indices.tolist() == sorted(set(largest))


def test_labels_and_rows_of_a_source():
    source = catalog.load("digits", "train[:1100]+test[5:9]")
    labels = read_labels(source, threads=4)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [source[i]["label"] for i in range(1104)])
    rows = Rows(source, np.array([1101, 3]))
    assert (len(rows), rows.class_names) == (2, source.class_names)
    np.testing.assert_array_equal(rows[0]["image"], source[1101]["image"])
    np.testing.assert_array_equal(rows[1]["image"], source[3]["image"])


# --- Few-shot -----------------------------------------------------------------------------


def least_squares(train, test, num_classes, l2):
    """Predictions, step by step as the procedure is described, in float64."""
    mean = train.values.astype(np.float64).mean(axis=0)
    std = train.values.astype(np.float64).std(axis=0) + 1e-5
    with_constant = lambda x: np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
    x, y = with_constant(train.values), -np.ones((len(train.labels), num_classes))
    y[np.arange(len(y)), train.labels] = 1.0
    n, width = x.shape
    if n >= width:
        eigenvalues, vectors = np.linalg.eigh(x.T @ x)
        weights = vectors @ np.diag(1 / (eigenvalues + l2)) @ vectors.T @ x.T @ y
    else:
        eigenvalues, vectors = np.linalg.eigh(x @ x.T)
        weights = x.T @ vectors @ np.diag(1 / (eigenvalues + l2)) @ vectors.T @ y
    return (with_constant(test.values) @ weights).argmax(axis=1)


@pytest.mark.parametrize("l2", [1024.0, 1.0])
def test_few_shot_is_regularised_least_squares(digits, l2):
    train, test = digits
    subsets = few_shot.choose_subsets(train.labels, 10, (1, 5, 25))  # fewer and more than 64
    found = few_shot.few_shot_accuracy(train.take(subsets.indices), test, subsets, 10, l2)
    for shots in (1, 5, 25):
        for seed in (0, 1, 2):
            chosen = train.take(few_shot.choose_shots(train.labels, 10, shots, seed))
            expected = (least_squares(chosen, test, 10, l2) == test.labels).mean()
            assert found[shots][seed] == expected


def test_few_shot_of_digit_pixels(digits):
    train, test = digits
    subsets = few_shot.choose_subsets(train.labels, 10, (5, 10))
    found = few_shot.few_shot_accuracy(train.take(subsets.indices), test, subsets, 10)
    hits = {shots: [round(a * 360) for a in accuracies] for shots, accuracies in found.items()}
    assert hits == {5: [279, 283, 290], 10: [301, 288, 298]}


@pytest.mark.parametrize("shots", [3, 30])
def test_few_shot_is_exact_for_features_that_strain_float32(shots):
    rng = np.random.default_rng(0)
    centres, mix = rng.standard_normal((20, 96)), rng.standard_normal((96, 96))
    decay = np.exp(-np.arange(96) / 12)

    def make(labels):
        x = (0.6 * centres[labels] + rng.standard_normal((len(labels), 96))) * decay @ mix
        x[:, 0], x[:, 1] = 7.1, 50 + 1e-4 * x[:, 1]  # constant; nearly so, far from zero
        x[:, 2] *= 1000
        return Features(np.float32(x), np.int32(labels))

    counts = 1 + shots * (np.arange(20) % 3)  # uneven, so that the constant feature matters
    train, test = make(np.repeat(np.arange(20), counts)), make(rng.integers(20, size=2000))
    expected = (least_squares(train, test, 20, 1024.0) == test.labels).mean()
    assert 0.2 < expected < 0.95
    assert few_shot.least_squares_accuracy(train, test, 20) == expected


@pytest.mark.parametrize("l2", [1e-3, 0.0, -1.0])
def test_an_l2_lost_in_rounding_is_refused(digits, l2):
    train, test = digits  # 1437 * 64 * 2**-23 = 0.011
    with pytest.raises(
        UserError, match=rf"--few_shot_l2 is {l2}: float32 needs more than 0.01"
    ):
        few_shot.least_squares_accuracy(train, test, 10, l2)


# --- k nearest neighbours -----------------------------------------------------------------


def test_neighbours_vote_as_in_scikit_learn(digits, monkeypatch):
    monkeypatch.setattr(features, "ROWS", 150)  # ten blocks of training images, three of test
    train, test = digits
    found = knn.knn_accuracy(train, test, 10, (1, 4, 20))
    for k, accuracy in found.items():
        judge = KNeighborsClassifier(
            k,
            algorithm="brute",
            metric="cosine",
            weights=lambda distance: np.exp((1 - distance) / 0.07),
        )
        assert accuracy == judge.fit(train.values, train.labels).score(test.values, test.labels)
    assert round(360 * found[20]) == 351


def test_the_temperature_weighs_the_votes():
    at = lambda degrees: np.array([[np.cos(d), np.sin(d)] for d in np.deg2rad(degrees)])
    scale = np.array([[5.0], [0.1], [1.0], [1.0]])  # lengths do not matter
    train = Features(np.float32(at([8, 25, -25, 90]) * scale), np.array([1, 0, 0, 2], np.int32))
    test = Features(np.float32(at([0])), np.array([1], np.int32))
    # Weights exp(cos / T) against the one of class 1: 2 exp((cos 25 - cos 8) / T).
    assert 2 * np.exp((np.cos(np.deg2rad(25)) - np.cos(np.deg2rad(8))) / 0.07) < 1
    assert knn.knn_accuracy(train, test, 3, (3,)) == {3: 1.0}
    assert knn.knn_accuracy(train, test, 3, (3,), temperature=1.0) == {3: 0.0}


def test_more_neighbours_than_training_images_are_refused(digits):
    few = digits[0].take(np.arange(15))
    with pytest.raises(UserError, match="--knn asks for 20 neighbours, but there are 15"):
        knn.knn_accuracy(few, digits[1], 10)


# --- Linear probe -------------------------------------------------------------------------


def cross_entropy(linear, x, labels, l2):
    weights, bias = (np.asarray(part, np.float64) for part in linear)
    logits = x @ weights + bias
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(x)), labels].mean() + l2 / 2 * (weights**2).sum()


@pytest.fixture
def in_two_blocks(monkeypatch):
    """Two blocks of all training digits, and of those to choose on; the last is padded."""
    monkeypatch.setattr(features, "ROWS", 750)


def standardised(train, *others):
    mean, std = train.values.mean(axis=0), train.values.std(axis=0) + 1e-5
    return [(features.values - mean) / std for features in (train, *others)]


@pytest.mark.usefixtures("in_two_blocks")
def test_softmax_regression_finds_the_optimum_of_scikit_learn(digits):
    (x,), labels, l2 = standardised(digits[0]), digits[0].labels, 1e-2
    judge = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-7, max_iter=10_000)
    judge.fit(x.astype(np.float64), labels)
    best = cross_entropy((judge.coef_.T, judge.intercept_), x, labels, l2)
    start = linear_probe.Linear(jnp.zeros((64, 10)), jnp.zeros(10))
    found = linear_probe.fit_softmax(x, labels, l2, start)
    assert best <= cross_entropy(found, x, labels, l2) < best + 1e-6
    np.testing.assert_allclose(found.weights, judge.coef_.T, atol=2e-3)


@pytest.mark.usefixtures("in_two_blocks")
def test_the_linear_probe_is_as_accurate_as_scikit_learn(digits):
    found = linear_probe.linear_probe_accuracy(*digits, 10)
    train, test = digits
    x, x_test = standardised(train, test)
    judge = LogisticRegression(C=1 / (found.l2 * len(x)), max_iter=10_000)
    expected = judge.fit(x, train.labels).score(x_test, test.labels)
    assert found.accuracy == pytest.approx(expected, abs=1.5 / 360)
    assert found.accuracy > 0.95
    assert found.l2 == 0.01  # training accuracy would have chosen 1e-4 or less


def test_one_image_a_class_is_too_few_to_choose_on(digits):
    one = digits[0].take(few_shot.choose_shots(digits[0].labels, 10, 1, 0))
    with pytest.raises(UserError, match="needs a class with two training examples"):
        linear_probe.linear_probe_accuracy(one, digits[1], 10)
