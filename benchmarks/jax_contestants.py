"""The contestants that run on XLA: ours, and the implementation that other projects use."""

import time
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.task import Task, product_size
from vit_jax import config as configuration
from vit_jax.distributed import sharding
from vit_jax.models import vit
from vit_jax.models.devices import split_by_example
from vit_jax.models.layers import store_in
from vit_jax.models.model import Model, one_size_only
from vit_jax.models.vit_config import ViTConfig
from vit_jax.objectives.classification import Classification
from vit_jax.training.optimizer import make_optimizer
from vit_jax.training.step import init_state, make_train_step

Run = Callable[[], None]  # returns when the work is done, not when it is queued
Facts = dict[str, float]


class FlaxBlock(nn.Module):
    """An encoder block of Flax's own layers."""

    cfg: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, norm = self.cfg, lambda: nn.LayerNorm(epsilon=self.cfg.layer_norm_eps)
        x = x + nn.MultiHeadDotProductAttention(cfg.num_heads, dtype=self.dtype)(norm()(x))
        y = nn.gelu(nn.Dense(cfg.mlp_dim, dtype=self.dtype)(norm()(x)), approximate=False)
        return split_by_example(x + nn.Dense(cfg.width, dtype=self.dtype)(y))


class FlaxViT(nn.Module):
    """The implementation of Google's vision_transformer and of big_vision, from Flax's layers.

    A convolution embeds patches; queries, keys and values are separate projections in (B, T,
    k, d) order; with `dtype=bfloat16` every layer returns bfloat16.
    """

    cfg: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        cfg, edge = self.cfg, (self.cfg.patch_size, self.cfg.patch_size)
        x = nn.Conv(cfg.width, edge, strides=edge, padding="VALID", dtype=self.dtype)(images)
        x = x.reshape(len(x), -1, cfg.width)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, cfg.width)).astype(x.dtype)
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        positions = nn.initializers.normal(0.02)
        x = x + self.param("positions", positions, (1, *x.shape[1:])).astype(x.dtype)
        x = self.blocks(split_by_example(x))
        x = nn.LayerNorm(epsilon=cfg.layer_norm_eps)(x)
        return nn.Dense(cfg.num_classes)(x[:, 0])

    def blocks(self, x: jax.Array) -> jax.Array:
        """One after another, or a loop with `scan`; `dots` keeps results of dense layers."""
        cfg, block = self.cfg, FlaxBlock
        if cfg.remat != "none":
            keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = keep if cfg.remat == "dots" else None
            block = nn.remat(block, policy=policy, prevent_cse=not cfg.scan)
        if not cfg.scan:
            for _ in range(cfg.depth):
                x = block(cfg, self.dtype)(x)
            return x
        body = lambda module, x: (module(x), None)
        loop = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(body, length=cfg.depth, **loop)(block(cfg, self.dtype), x)[0]


def flax_layers(cfg: ViTConfig, dtype: Any = None) -> Model:
    """The same as our `Model`, so that one training step serves both.

    `dtype` replaces that of `cfg`, which cannot be float64.
    """
    module = FlaxViT(cfg, jnp.dtype(dtype or cfg.dtype))

    def init(key: jax.Array) -> Any:
        return module.init(key, jnp.zeros((1, *cfg.image_size, cfg.channels)))["params"]

    def apply(params: Any, images: jax.Array, **_: Any) -> Any:
        return cast(jax.Array, module.apply({"params": params}, images)), {}

    return Model(cfg, init, apply, one_size_only(cfg))


def for_flax(params: Any, depth: int) -> Any:
    """Our parameters under the names of `FlaxViT`."""
    encoder = params["Transformer"]
    tree = {
        "Conv_0": params["embedding"],
        "cls": params["cls"],
        "positions": encoder["posembed_input"]["pos_embedding"],
        "LayerNorm_0": encoder["encoder_norm"],
        "Dense_0": params["head"],
    }
    for i in range(depth):
        block = encoder[f"encoderblock_{i}"]
        names = ("LayerNorm_0", "LayerNorm_1", "MultiHeadDotProductAttention_0")
        tree[f"FlaxBlock_{i}"] = {n: block[n] for n in names} | block["MlpBlock_0"]
    return tree


BUILDERS: dict[str, Callable[[ViTConfig], Model]] = {"ours": vit.build, "flax": flax_layers}


def build(builder: str, options: dict[str, Any], task: Task) -> Model:
    cfg = ViTConfig(**task.shape, **options, gelu="erf", dtype=task.dtype)
    return BUILDERS[builder](cfg)


class Laps:
    """Seconds between one call and the next, by name."""

    def __init__(self) -> None:
        self.facts: Facts = {}
        self._clock = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.facts[name], self._clock = now - self._clock, now


def compile_program(function: Any, laps: Laps, *args: Any) -> Any:
    """Traces and compiles, each with its lap, and notes what memory XLA plans to use."""
    lowered = function.lower(*args)
    laps.end("trace")
    compiled = lowered.compile()
    laps.end("compile")
    if (sizes := compiled.memory_analysis()) is not None:
        laps.facts["program_bytes"] = sizes.temp_size_in_bytes + sizes.argument_size_in_bytes
    return compiled


def inference(builder: str, options: dict[str, Any], task: Task) -> tuple[Run, Facts]:
    """The network as `predict`, `embed` and `evaluate` compute it, with images on the device.

    They store kernels in the precision of the products. With `as_trained`, and in the
    implementation of others, kernels stay float32 and are cast in each call.
    """
    laps, options = Laps(), dict(options)
    as_trained = options.pop("as_trained", builder != "ours")
    stored = "float32" if as_trained else task.dtype
    model = build(builder, options, task)
    params = jax.jit(lambda key: store_in(stored, model.init(key)))(jax.random.key(0))
    images = jax.device_put(task.example()[0])
    jax.block_until_ready((params, images))
    laps.end("init")
    apply = jax.jit(lambda params, images: model.apply(params, images)[0])
    compiled = compile_program(apply, laps, params, images)
    return lambda: jax.block_until_ready(compiled(params, images)), laps.facts


def optimizer_config() -> Any:
    """AdamW without clipping, which is what torch's AdamW does."""
    config = configuration.get_config().optimizer
    config.update({"weight_decay": 0.1, "clip_norm": 0.0})
    return config


def training(builder: str, options: dict[str, Any], task: Task) -> tuple[Run, Facts]:
    """The update of `vit_jax.train`, around any model.

    With `keep_barriers` XLA keeps the barriers that hold recomputation and what it repeats
    apart. Its compiler for CPUs removes them early, then finds the two equal and merges them,
    which is why rematerialisation saves nothing there outside a loop.
    """
    laps, options = Laps(), dict(options)
    keep = options.pop("keep_barriers", False)
    flags = {"xla_disable_hlo_passes": "cse_barrier_expander"} if keep else None
    objective = Classification(build(builder, options, task))
    schedule = optax.constant_schedule(1e-4)
    optimizer = make_optimizer(optimizer_config(), schedule)
    step = make_train_step(objective, optimizer, schedule, lambda batch, key: batch, seed=0)
    mesh = sharding.make_mesh(devices=jax.devices()[: task.devices])
    everywhere = sharding.replicated(mesh)
    init = lambda: init_state(objective, optimizer, 0, False)
    state = jax.jit(init, out_shardings=everywhere)()
    images, labels = task.example()
    batch = sharding.put_batch({"image": images, "label": labels}, mesh)
    jax.block_until_ready((state, batch))
    laps.end("init")
    program = jax.jit(step, donate_argnums=0, compiler_options=flags)
    compiled = compile_program(program, laps, state, batch)

    def run() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return run, laps.facts


def product(task: Task) -> tuple[Run, Facts]:
    """A large matrix product: `dtype` operands, accumulated and returned in float32."""
    size = product_size(task.backend)
    a, b = jax.random.normal(jax.random.key(0), (2, size, size)).astype(task.dtype)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: jax.block_until_ready(multiply(a, b)), {}


def prepare(builder: str, options: dict[str, Any], task: Task, threads: int) -> Any:
    """`(run, facts)` of a contestant; XLA itself counts the cores that it may use."""
    if builder == "product":
        return product(task)
    return (training if task.training else inference)(builder, options, task)


def device_peak() -> int | None:
    """Bytes: the most memory of the card that was in use, None where XLA does not say."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
