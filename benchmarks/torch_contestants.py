"""The contestants that run on PyTorch: timm and Hugging Face, eager or compiled."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import library

from benchmarks.task import CLASSES, Task, product_size

Run = Callable[[], None]  # returns when the work is done, not when it is queued


def timm_model(task: Task) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=tuple(task.image_size),
        patch_size=task.patch_size,
        num_classes=CLASSES,
        embed_dim=task.width,
        depth=task.depth,
        num_heads=task.num_heads,
        mlp_ratio=task.mlp_dim / task.width,
    )


class HuggingFaceLogits(torch.nn.Module):
    """Images to logits, without the wrapper around them."""

    def __init__(self, task: Task):
        from transformers import ViTConfig, ViTForImageClassification

        super().__init__()
        config = ViTConfig(
            hidden_size=task.width,
            num_hidden_layers=task.depth,
            num_attention_heads=task.num_heads,
            intermediate_size=task.mlp_dim,
            image_size=task.image_size[0],
            patch_size=task.patch_size,
            num_labels=CLASSES,
            attn_implementation="sdpa",
        )
        self.model = ViTForImageClassification(config)

    def forward(self, images: Any) -> Any:
        return self.model(images).logits


BUILDERS: dict[str, Callable[[Task], Any]] = {
    "timm": timm_model,
    "hugging_face": HuggingFaceLogits,
}


def make_torchvision_importable() -> None:
    """timm and Hugging Face import torchvision for their data transforms.

    On a machine whose torch has no CUDA, the published torchvision finds its operators
    missing and refuses to import when it registers their shape rules. Nothing here uses those
    operators, so the rules are left out.
    """
    register = library.register_fake

    def unless_torchvision(name: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *args, **kwargs)

    library.register_fake = unless_torchvision
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    finally:
        library.register_fake = register


def device(task: Task) -> str:
    return "cuda" if task.backend == "gpu" else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def example(task: Task) -> tuple[Any, Any]:
    """(B, C, H, W) images and (B,) labels, in torch's order of axes."""
    images, labels = task.example()
    channels_first = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return channels_first.to(device(task)), torch.from_numpy(labels).long().to(device(task))


def inference(builder: str, compiled: bool, task: Task) -> Run:
    """In bfloat16 weights and images are stored in it, which is fastest in torch."""
    precision = getattr(torch, task.dtype)
    model = BUILDERS[builder](task).eval().to(device(task), precision)
    forward = torch.compile(model) if compiled else model
    images = example(task)[0].to(precision)

    def run() -> None:
        with torch.inference_mode():
            forward(images)
        synchronize()

    return run


def training(builder: str, compiled: bool, task: Task) -> Run:
    """In bfloat16 by autocast: float32 weights, as training needs."""
    model = BUILDERS[builder](task).train().to(device(task))
    forward = torch.compile(model) if compiled else model
    # Our defaults; weight decay on all, which costs the same.
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-4, (0.9, 0.999), 1e-8, weight_decay=0.1, fused=True
    )
    images, labels = example(task)
    half = task.dtype == "bfloat16"

    def run() -> None:
        with torch.autocast(device(task), torch.bfloat16, enabled=half):
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()

    return run


def product(task: Task) -> Run:
    """A large matrix product; in bfloat16 the result is, too."""
    size = product_size(task.backend)
    a, b = torch.randn(2, size, size).to(device(task), getattr(torch, task.dtype))

    def run() -> None:
        torch.matmul(a, b)
        synchronize()

    return run


def prepare(builder: str, options: dict[str, Any], task: Task, threads: int) -> Any:
    """`(run, facts)` of a contestant."""
    torch.set_num_threads(threads)
    if task.backend == "gpu":
        torch.set_float32_matmul_precision("high")  # TF32, which is XLA's default there
    start, compiled = time.perf_counter(), options.get("compiled", False)
    if builder == "product":
        return product(task), {}
    make_torchvision_importable()
    run = (training if task.training else inference)(builder, compiled, task)
    return run, {"init": time.perf_counter() - start}


def device_peak() -> int | None:
    """Bytes: the most memory of the card that tensors held; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
