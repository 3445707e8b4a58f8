"""The contestants that are runtimes for inference on CPUs: ONNX Runtime and OpenVINO.

They run timm's network, exported for one batch size, and must return torch's logits.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.exported import export
from benchmarks.task import Task
from vit_jax.system.errors import UserError

Infer = Callable[[], np.ndarray]  # computes the batch; (B, classes) logits

# Largest difference to torch's logits in float32, in parts of the largest of them.
TOLERANCE = {"float32": 2e-5, "bfloat16": 5e-2}


def onnxruntime(file: Path, images: np.ndarray, dtype: str, threads: int) -> Infer:
    """With the optimisations that a session makes; those of its offline tools are not used."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    [name] = [each.name for each in session.get_inputs()]
    return lambda: session.run(None, {name: images})[0]


def openvino(file: Path, images: np.ndarray, dtype: str, threads: int) -> Infer:
    """One stream on all cores, with the hint for latency: one batch is computed at a time.

    The precision is always given, since OpenVINO computes in bfloat16 by default on CPUs that
    can.

    Raises:
      UserError: it computes in another precision than `dtype`.
    """
    import openvino as ov

    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # Else two threads of one core count as one.
        "ENABLE_HYPER_THREADING": True,
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = ov.Core().compile_model(file, "CPU", settings)
    found = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if found != precision:
        raise UserError(f"OpenVINO computes in {found} on this CPU, which has no {dtype}")
    return lambda: compiled(images, share_inputs=True)[0]  # without a copy of the images


BUILDERS: dict[str, tuple[str, Callable[[Path, np.ndarray, str, int], Infer]]] = {
    "onnxruntime": ("onnx", onnxruntime),
    "openvino": ("openvino", openvino),
}


def check(found: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Raises UserError where logits are not those of torch."""
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if not error <= TOLERANCE[dtype]:
        raise UserError(
            f"its logits differ from torch's by {error:.2g} of the largest in {dtype}, more "
            f"than {TOLERANCE[dtype]:g}"
        )


def prepare(builder: str, options: dict[str, Any], task: Task, threads: int) -> Any:
    """`(run, facts)` of a contestant; `init` includes the export.

    Raises:
      UserError: it cannot be exported or computed, or does not compute the same.
    """
    if task.training:
        raise UserError(f"{builder} is here for inference only")
    start, (name, build) = time.perf_counter(), BUILDERS[builder]
    images = np.ascontiguousarray(task.example()[0].transpose(0, 3, 1, 2))
    with tempfile.TemporaryDirectory() as folder:
        file, expected = export(name, task, Path(folder))
        infer = build(file, images, task.dtype, threads)
    check(infer(), expected, task.dtype)
    return infer, {"init": time.perf_counter() - start}


def device_peak() -> int | None:
    """None: the memory is that of the process."""
    return None
