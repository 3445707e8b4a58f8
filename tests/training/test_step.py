import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.distributed import sharding
from vit_jax.evaluation.averages import make_eval_step
from vit_jax.models import vit
from vit_jax.objectives.classification import Classification
from vit_jax.objectives.objective import Carried
from vit_jax.training.step import init_state, make_train_step, split_micro_batches

CFG = {
    "image_size": (8, 8),
    "channels": 1,
    "patch_size": 4,
    "depth": 2,
    "width": 16,
    "mlp_dim": 32,
    "num_heads": 2,
    "num_classes": 4,
}
# Not Adam: the gradient of a key's bias is zero but for rounding, which Adam would blow up.
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
ASIS = lambda batch, key: batch
NOTHING = Carried({}, {}, {}, jnp.int32(0))


def objective(**fields):
    return Classification(vit.build(vit.ViTConfig(**{**CFG, **fields})))


def batch(size=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": np.float32(rng.standard_normal((size, 8, 8, 1))),
        "label": np.int32(rng.integers(0, 4, size)),
    }


def fresh(goal, ema=False):
    return jax.jit(lambda: init_state(goal, OPTIMIZER, 0, ema))()


def curve(devices=1, steps=6, accumulation=1, **fields):
    """Losses and final parameters (layers unstacked) of a few steps on so many devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    goal = objective(**fields)
    everywhere = sharding.replicated(mesh)
    init = jax.jit(lambda: init_state(goal, OPTIMIZER, 0, False), out_shardings=everywhere)
    make = functools.partial(make_train_step, goal, OPTIMIZER, lambda s: 0.01, ASIS, seed=0)
    step = jax.jit(make(accumulation=accumulation))
    state, losses = init(), []
    for i in range(steps):
        state, metrics = step(state, sharding.put_batch(batch(seed=i), mesh))
        losses.append(float(metrics["train/loss"]))
    params = jax.device_get(state.params["model"])
    return losses, vit.unstack_layers(params) if fields.get("scan") else params


@pytest.mark.parametrize(
    "switches",
    [
        {"devices": 2},
        {"devices": 4},
        {"accumulation": 4},
        {"devices": 4, "accumulation": 4},
        {"scan": True},
        {"remat": "full"},
        {"remat": "dots"},
        {"devices": 4, "accumulation": 2, "scan": True, "remat": "full"},
    ],
    ids=str,
)
def test_no_switch_changes_the_loss_curve(switches):
    losses, params = curve()
    other_losses, other_params = curve(**switches)
    assert len(set(losses)) == len(losses)  # it moves
    np.testing.assert_allclose(other_losses, losses, rtol=2e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(close, other_params, params)


def test_micro_batches_hold_every_example_once_and_stay_on_their_device():
    parts = split_micro_batches({"x": jnp.arange(8)}, 4)["x"]
    np.testing.assert_array_equal(parts, [[0, 4], [1, 5], [2, 6], [3, 7]])


def test_each_micro_batch_draws_its_own_dropout():
    """The same example four times over gives four different losses."""
    seen = []

    class Spy(Classification):
        def loss(self, params, carried, batch, key):
            record = lambda key: seen.append(tuple(map(int, key)))
            jax.debug.callback(record, jax.random.key_data(key))
            return super().loss(params, carried, batch, key)

    goal = Spy(objective(dropout=0.5).model)
    step = jax.jit(
        make_train_step(goal, OPTIMIZER, lambda s: 0.01, ASIS, seed=0, accumulation=4)
    )
    state, _ = step(fresh(goal), batch())
    step(state, batch())
    jax.effects_barrier()
    assert len(seen) == 8
    assert len(set(seen)) == 8


def test_a_step_is_a_function_of_seed_and_step_alone():
    goal = objective(dropout=0.3, stochastic_depth=0.2)
    make = lambda seed: jax.jit(
        make_train_step(goal, OPTIMIZER, lambda s: 0.01, ASIS, seed=seed)
    )
    state = fresh(goal)
    state, _ = make(0)(state, batch())  # past the zero head, which hides everything
    a, b = make(0)(state, batch())[1], make(0)(state, batch())[1]
    jax.tree.map(np.testing.assert_array_equal, a, b)
    later = state.replace(step=state.step + 1)
    assert make(0)(later, batch())[1]["train/loss"] != a["train/loss"]
    assert make(1)(state, batch())[1]["train/loss"] != a["train/loss"]


def test_ema_is_the_exponential_moving_average_of_the_weights():
    goal = objective()
    step = jax.jit(
        make_train_step(goal, OPTIMIZER, lambda s: 0.01, ASIS, seed=0, ema_decay=0.9)
    )
    state = fresh(goal, ema=True)
    state = state.replace(params=jax.tree.map(lambda x: x + 0.1, state.params))
    expected = jax.device_get(state.ema)
    for i in range(3):
        state, _ = step(state, batch(seed=i))
        mix = lambda e, p: 0.9 * np.float64(e) + 0.1 * np.float64(p)
        expected = jax.tree.map(mix, expected, jax.device_get(state.params))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(close, state.ema, expected)
    assert state.eval_params is state.ema
    assert fresh(goal).eval_params is not None


def test_metrics_are_those_of_the_whole_batch():
    goal = objective()
    state = fresh(goal)
    schedule = lambda step: 0.01 * (step + 1)
    step = jax.jit(make_train_step(goal, OPTIMIZER, schedule, ASIS, seed=0))
    _, metrics = step(state, batch())
    assert float(metrics["train/loss"]) == pytest.approx(np.log(4), rel=1e-5)  # zero head
    assert float(metrics["lr"]) == pytest.approx(0.01)
    sums = jax.jit(make_eval_step(goal, ASIS))(state.params, NOTHING, batch())
    assert float(sums["accuracy"][0]) / 16 == float(metrics["train/accuracy"])
    loss = lambda params: goal.loss(params, NOTHING, batch(), jax.random.key(0)).loss
    grads = jax.grad(loss)(state.params)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)


def test_a_batch_that_devices_do_not_divide_is_refused():
    mesh = sharding.make_mesh()
    with pytest.raises(sharding.UserError, match=r"batch_size is 6, which 8 devices"):
        sharding.check_batch_size("batch_size", 6, mesh)
    sharding.check_batch_size("batch_size", 16, mesh, 2)
    with pytest.raises(sharding.UserError, match="use a multiple of 24"):
        sharding.check_batch_size("batch_size", 16, mesh, 3)
