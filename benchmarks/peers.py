"""The table of contestants: our variants, and the same network in other projects.

All compute one function of one shape (see `task.Task`). Weights are random; images are
normalised float32 arrays that are on the device before the clock starts.
"""

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from vit_jax.system.errors import UserError


class Contestant(NamedTuple):
    """One way to compute the network.

    Attributes:
      name: in tables.
      framework: whose module, `jax_contestants`, `torch_contestants` or
        `runtime_contestants`, has the builder.
      builder: what builds the network there.
      options: how it is built: fields of our `ViTConfig`, `as_trained` and
        `keep_barriers` (see `jax_contestants`), or `compiled` of torch.
      training: what replaces that in training.
      environment: variables that its process starts with.
      dtypes: those in which it is measured.
      needs: packages without which it is left out.
    """

    name: str
    framework: str
    builder: str
    options: Mapping[str, Any] = {}
    training: Mapping[str, Any] = {}
    environment: Mapping[str, str] = {}
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    needs: tuple[str, ...] = ()


# glibc returns large blocks to the system when they are freed, and every step faults them in
# again. With these settings it keeps them. It reads them only when a process starts.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}
REFERENCE = "timm"  # what ratios are against, where it is installed
OURS = "vit_jax"
_TIMM, _HUGGING_FACE = ("torch", "timm"), ("torch", "transformers")
_ONNX_RUNTIME = (*_TIMM, "onnx", "onnxscript", "onnxruntime")
_COMPILED = {"compiled": True}
# What `python -m vit_jax.train` chooses where the configuration leaves it open.
_TRAINING = {"scan": True, "remat": "dots"}
# XLA's compiler for CPUs undoes unrolled rematerialisation by default.
_UNROLLED_DOTS = {"remat": "dots", "keep_barriers": True}
_AS_TRAINED: dict[str, Any] = {"options": {"as_trained": True}, "dtypes": ("bfloat16",)}
CONTESTANTS = {
    found.name: found
    for found in (
        Contestant(OURS, "jax", "ours", training=_TRAINING),
        Contestant("vit_jax, float32 kernels", "jax", "ours", **_AS_TRAINED),
        Contestant("vit_jax, memory kept", "jax", "ours", {}, _TRAINING, KEEP_MEMORY),
        Contestant("vit_jax, scan", "jax", "ours", {"scan": True}),
        Contestant("vit_jax, remat full", "jax", "ours", {"scan": True, "remat": "full"}),
        Contestant("vit_jax, unrolled", "jax", "ours"),
        Contestant("vit_jax, unrolled, dots", "jax", "ours", _UNROLLED_DOTS),
        Contestant("Flax layers", "jax", "flax"),
        Contestant("timm", "torch", "timm", needs=_TIMM),
        Contestant("timm, compiled", "torch", "timm", _COMPILED, needs=_TIMM),
        Contestant("timm, memory kept", "torch", "timm", {}, {}, KEEP_MEMORY, needs=_TIMM),
        Contestant("Hugging Face", "torch", "hugging_face", needs=_HUGGING_FACE),
        # Not in bfloat16, in which ONNX Runtime has no matrix product on CPUs.
        Contestant(
            "ONNX Runtime", "runtime", "onnxruntime", dtypes=("float32",), needs=_ONNX_RUNTIME
        ),
        Contestant("OpenVINO", "runtime", "openvino", needs=(*_TIMM, "openvino")),
    )
}
# The reference: a large matrix product by each installed library.
PRODUCTS = (
    Contestant("product of jax", "jax", "product"),
    Contestant("product of torch", "torch", "product", needs=("torch",)),
)


def missing(contestant: Contestant, backend: str) -> str | None:
    """What is missing to run it, packages or a device; None where it can run."""
    if absent := [name for name in contestant.needs if not importlib.util.find_spec(name)]:
        return f"{', '.join(absent)} not installed"
    if contestant.environment and not (backend == "cpu" and shutil.which("ldd")):
        return "it needs glibc and a CPU"  # the variables are glibc's, whose program is ldd
    if contestant.framework == "runtime" and backend != "cpu":
        return "it needs a CPU"
    if contestant.framework == "torch":
        if backend == "tpu":
            return "it cannot use a TPU"
        compiler = backend == "gpu" or shutil.which("g++") or shutil.which("clang++")
        if contestant.options.get("compiled") and not compiler:
            return "no C++ compiler"
    return None


def is_here(contestant: Contestant, backend: str) -> bool:
    """Whether its packages are installed and the device is one that it can use."""
    return missing(contestant, backend) is None


def choose(names: list[str] | None, default: tuple[str, ...], backend: str) -> list[Contestant]:
    """Those named by a flag, or those of `default` that can run; prints which are left out.

    Raises:
      UserError: one of the names is unknown.
    """
    here = [name for name, found in CONTESTANTS.items() if is_here(found, backend)]
    for name in names or ():
        if name not in here:
            raise UserError(
                f"--contestants has {name!r}, which is not here: use some of "
                f"{'; '.join(here)}, or install the [bench] extra"
            )
    for name in () if names else default:
        if lacks := missing(CONTESTANTS[name], backend):
            print(f"note: {name} is left out: {lacks}", file=sys.stderr)
    return [CONTESTANTS[name] for name in names or default if name in here]
