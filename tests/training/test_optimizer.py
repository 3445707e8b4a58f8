import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import get_config
from vit_jax.system.errors import UserError
from vit_jax.training.optimizer import kernels_only, make_optimizer, make_schedule

PARAMS = {
    "head": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([1.0, 1.0])},
    "cls": jnp.ones((1, 1, 2)),
    "norm": {"scale": jnp.ones(2)},
}
GRADS = jax.tree.map(lambda x: 0.1 * jnp.cos(x), PARAMS)


# --- Schedules ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (250, 0.015), (500, 0.03), (5250, 0.015), (10_000, 0.0)]
)
def test_cosine_golden_values(step, expected):
    schedule = make_schedule("cosine", 0.03, total=10_000, warmup=500)
    assert float(schedule(step)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_linear_ends_at_linear_end_and_starts_to_fall_after_warmup():
    schedule = make_schedule("linear", 1e-3, total=1000, warmup=100)
    assert float(schedule(0)) == 0
    assert float(schedule(50)) == pytest.approx(5e-4)
    assert float(schedule(100)) == pytest.approx(1e-3)
    assert float(schedule(550)) == pytest.approx(1e-5 + (1e-3 - 1e-5) / 2)
    assert float(schedule(1000)) == pytest.approx(1e-5)
    assert float(schedule(2000)) == pytest.approx(1e-5)


def test_rsqrt_with_cooldown():
    schedule = make_schedule("rsqrt", 1e-3, total=1000, warmup=100, cooldown=200, timescale=100)
    assert float(schedule(50)) == pytest.approx(5e-4)
    assert float(schedule(100)) == pytest.approx(1e-3)
    assert float(schedule(400)) == pytest.approx(1e-3 / np.sqrt(4))
    assert float(schedule(900)) == pytest.approx(0.5 * 1e-3 / np.sqrt(9))
    assert float(schedule(1000)) == 0


def test_constant_without_warmup():
    schedule = make_schedule("constant", 0.1, total=10)
    assert [float(schedule(s)) for s in (0, 5, 9)] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "step"}, r"optimizer\.schedule is 'step': use one of cosine, linear"),
        ({"warmup": 11}, r"optimizer\.warmup is 11 steps .* only 10 long"),
        ({"cooldown": 2}, r"optimizer\.cooldown is 2 steps, but the cosine schedule"),
    ],
)
def test_schedule_errors(fields, message):
    with pytest.raises(UserError, match=message):
        make_schedule(**{"name": "cosine", "base": 1.0, "total": 10, **fields})


# --- Optimisers: every decay semantics against the written-out formula ---------------------


def config(**fields):
    optimizer = get_config().optimizer
    optimizer.update({"clip_norm": 0.0, "lr": 0.01, "weight_decay": 0.1, **fields})
    return optimizer


def run(config, schedule, steps):
    optimizer, params = make_optimizer(config, schedule), PARAMS
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def reference(config, schedule, steps, name):
    """One parameter through the same updates, in float64 and in plain words."""
    p = np.asarray(PARAMS["head"][name], np.float64)
    gradient = np.asarray(GRADS["head"][name], np.float64)
    w = config.weight_decay if name == "kernel" else 0.0
    m = v = 0.0
    for t in range(1, steps + 1):
        lr = float(schedule(t - 1))
        g = gradient + w * p if config.decay == "l2" else gradient
        if config.name == "adam":
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        else:
            m = 0.9 * m + g
            direction = m
        decay = {"times_lr": lr * w, "times_schedule": lr / config.lr * w, "l2": 0.0}
        p = p - lr * direction - decay[config.decay] * p
    return p


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("decay", ["times_lr", "times_schedule", "l2"])
def test_updates_are_the_written_out_formula(name, decay):
    cfg = config(name=name, decay=decay)
    schedule = make_schedule("cosine", cfg.lr, total=20, warmup=4)
    params, _ = run(cfg, schedule, 7)
    for leaf in ("kernel", "bias"):
        expected = reference(cfg, schedule, 7, leaf)
        np.testing.assert_allclose(params["head"][leaf], expected, rtol=2e-6)


def test_big_visions_decay_is_adamws_times_the_peak_learning_rate():
    schedule = make_schedule("cosine", 1e-3, total=20, warmup=4)
    adamw = run(config(lr=1e-3, weight_decay=0.1), schedule, 9)[0]
    big_vision = config(lr=1e-3, weight_decay=1e-4, decay="times_schedule")
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(close, adamw, run(big_vision, schedule, 9)[0])


def test_adamw_equals_optax_adamw():
    schedule = make_schedule("linear", 0.01, total=20, warmup=4)
    found = run(config(), schedule, 5)[0]
    optimizer, params = optax.adamw(schedule, weight_decay=0.1, mask=kernels_only), PARAMS
    state = optimizer.init(params)
    for _ in range(5):
        updates, state = optimizer.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, params)


def test_only_kernels_decay():
    mask = kernels_only(PARAMS)
    assert mask == {
        "head": {"kernel": True, "bias": False},
        "cls": False,
        "norm": {"scale": False},
    }


def test_clipping_is_by_global_norm_and_comes_first():
    norm = float(optax.tree.norm(GRADS))
    schedule = make_schedule("constant", 1.0, total=10)
    fields = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0}
    clipped = run(config(**fields, clip_norm=norm / 2), schedule, 1)[0]
    free = run(config(**fields, clip_norm=norm * 2), schedule, 1)[0]
    for before, half, full in zip(*map(jax.tree.leaves, (PARAMS, clipped, free)), strict=True):
        np.testing.assert_allclose(before - half, (before - full) / 2, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_first_moment_can_be_bfloat16(name):
    schedule = make_schedule("constant", 0.01, total=10)
    params, state = run(config(name=name, moment_dtype="bfloat16"), schedule, 3)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert dtypes == ({"bfloat16", "float32"} if name == "adam" else {"bfloat16"})
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    full = run(config(name=name), schedule, 3)[0]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3)
    jax.tree.map(close, params, full)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "lion"}, r"optimizer\.name is 'lion': use one of adam, sgd"),
        ({"decay": "adamw"}, r"optimizer\.decay is 'adamw': use one of times_lr"),
        ({"lr": 0.0}, r"optimizer\.lr is 0\.0: it must be positive"),
        ({"moment_dtype": "float16"}, r"optimizer\.moment_dtype is 'float16'"),
    ],
)
def test_optimizer_errors(fields, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(config(**fields), lambda step: step)
