"""timm's network as a file for a runtime: `python -m benchmarks.exported FORMAT FOLDER`.

A separate process, so that the one that measures has the runtime in memory and not torch. The
task is given as a line of JSON; besides the network the folder gets the logits of torch for the
task's images, in float32, which the runtime is compared with. Works on CPUs.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.task import Task
from vit_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]
LOGITS = "logits.npy"


def to_onnx(model: Any, images: Any, folder: Path) -> None:
    import torch

    torch.onnx.export(model, (images,), folder / "model.onnx", dynamo=True)


def to_openvino(model: Any, images: Any, folder: Path) -> None:
    """In float32, which `save_model` would otherwise round to float16."""
    # `convert_model` sends statistics of its use wherever it can import this.
    sys.modules["openvino_telemetry"] = cast(Any, None)
    import openvino

    converted = openvino.convert_model(model, example_input=images, input=images.shape)
    openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)


# What each format is written by, and the file that the runtime opens.
FORMATS: dict[str, tuple[Callable[[Any, Any, Path], None], str]] = {
    "onnx": (to_onnx, "model.onnx"),
    "openvino": (to_openvino, "model.xml"),
}


def write(name: str, task: Task, folder: Path) -> None:
    convert, _ = FORMATS[name]
    import torch

    from benchmarks import torch_contestants

    torch_contestants.make_torchvision_importable()
    torch.manual_seed(0)
    model = torch_contestants.BUILDERS["timm"](task).eval()
    images = torch_contestants.example(task)[0]
    with torch.inference_mode():
        np.save(folder / LOGITS, model(images).numpy())
    with torch.no_grad():
        convert(model, images, folder)


def export(name: str, task: Task, folder: Path) -> tuple[Path, np.ndarray]:
    """The file of the network, and torch's (B, classes) logits.

    Raises:
      UserError: it could not be written.
    """
    command = [sys.executable, "-m", "benchmarks.exported", name, str(folder)]
    order = json.dumps(task._asdict())
    found = subprocess.run(command, cwd=ROOT, input=order, capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or [f"code {found.returncode}"])[-1]
        raise UserError(f"timm's network could not be exported as {name}: {reason}")
    return folder / FORMATS[name][1], np.load(folder / LOGITS)


if __name__ == "__main__":
    write(sys.argv[1], Task(**json.loads(sys.stdin.read())), Path(sys.argv[2]))
