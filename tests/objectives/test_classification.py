import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.model import Model
from vit_jax.objectives.classification import Classification, smooth_labels
from vit_jax.objectives.objective import Carried, only_model
from vit_jax.system.errors import UserError

LOGITS = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, 0.0], [1.0, 1.0, -4.0], [9.0, 0.0, 0.0]])
LABELS = jnp.array([0, 2, 1, 0])
KEY = jax.random.key(0)


def objective(**fields):
    """A "model" whose logits are its input, so that only the objective is tested."""
    model = Model(None, lambda key: {}, lambda params, images, **kwargs: (images, {}), None)
    return Classification(model, **fields)


def run(batch, train=True, **fields):
    goal, params, carried = objective(**fields), only_model({}), Carried({}, {}, {}, 0)
    metrics = goal.evaluate(params, carried, batch)
    if train:
        loss, metrics, _ = goal.loss(params, carried, batch, KEY)
        assert float(loss) == float(metrics["loss"][0] / metrics["loss"][1])
    found = {name: tuple(map(float, value)) for name, value in metrics.items()}
    return found["loss"][0] / found["loss"][1], found


def test_softmax_cross_entropy():
    loss, metrics = run({"image": LOGITS, "label": LABELS})
    x = np.asarray(LOGITS, np.float64)
    expected = np.log(np.exp(x).sum(1)) - x[np.arange(4), LABELS]
    assert loss == pytest.approx(expected.mean(), rel=1e-6)
    assert metrics["loss"] == (pytest.approx(expected.sum(), rel=1e-6), 4)
    assert metrics["accuracy"] == (2, 4)  # a tie goes to the first class


def test_sigmoid_cross_entropy_is_summed_over_classes():
    loss, _ = run({"image": LOGITS, "label": LABELS}, loss_name="sigmoid")
    x, t = np.asarray(LOGITS, np.float64), np.eye(3)[np.asarray(LABELS)]
    p = 1 / (1 + np.exp(-x))
    expected = -(t * np.log(p) + (1 - t) * np.log(1 - p)).sum(1).mean()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_sigmoid_head_bias_of_minus_log_classes_starts_near_one_over_classes():
    bias = jnp.full((1, 1000), -6.9)
    loss, _ = run({"image": bias, "label": jnp.array([3])}, loss_name="sigmoid")
    assert loss == pytest.approx(6.9 + 1000 * np.log1p(np.exp(-6.9)), rel=1e-4)


def test_label_smoothing_golden_values_and_only_in_training():
    np.testing.assert_allclose(
        smooth_labels(jnp.array([[0.0, 1.0, 0.0, 0.0]]), 0.1), [[0.025, 0.925, 0.025, 0.025]]
    )
    batch = {"image": LOGITS, "label": LABELS}
    plain, smooth = run(batch)[0], run(batch, label_smoothing=0.1)[0]
    x = np.asarray(LOGITS, np.float64)
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    assert smooth == pytest.approx(0.9 * plain - 0.1 * log_p.mean(), rel=1e-5)
    assert run(batch, train=False, label_smoothing=0.1)[0] == plain


def test_masked_examples_count_for_nothing_even_when_they_are_nan():
    batch = {
        "image": LOGITS.at[3].set(jnp.nan),
        "label": LABELS,
        "mask": jnp.array([1.0, 1.0, 1.0, 0.0]),
    }
    loss, metrics = run(batch, train=False)
    first = run({"image": LOGITS[:3], "label": LABELS[:3]})[1]
    assert metrics == {k: (pytest.approx(v[0]), v[1]) for k, v in first.items()}
    assert loss == pytest.approx(first["loss"][0] / 3)


def test_soft_targets_replace_labels():
    targets = np.array([[0.7, 0.3, 0.0]] * 4)
    loss, metrics = run({"image": LOGITS, "label": LABELS, "targets": targets})
    x = np.asarray(LOGITS, np.float64)
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    assert loss == pytest.approx(-(targets * log_p).sum(1).mean(), rel=1e-5)
    assert metrics["accuracy"] == (3, 4)  # against the heavier of the mixed labels


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_name": "hinge"}, r"objective\.loss is 'hinge': use one of softmax, sigmoid"),
        ({"label_smoothing": 1.0}, r"objective\.label_smoothing is 1\.0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        objective(**fields)
