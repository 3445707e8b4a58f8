"""What a `config.json` of Hugging Face says about images and classes."""

from pathlib import Path
from typing import Any

from vit_jax.system.errors import UserError


def image_size_of(config: dict[str, Any]) -> tuple[int, int] | None:
    """(H, W) in any of the published forms, None where it is in none of them."""
    size = config.get("image_size")
    size = [size.get("height"), size.get("width")] if isinstance(size, dict) else size
    match size if isinstance(size, list) else [size, size]:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None  # the position embeddings determine it


PROBLEMS = ("single_label_classification", "multi_label_classification")


def classes(
    config: dict[str, Any], outputs: int, source: Path, notes: list[str]
) -> dict[str, Any]:
    """What a `config.json` says about the outputs of the head: fields of an `Imported`.

    Raises:
      UserError: they are no scores of classes.
    """
    problem = config.get("problem_type")
    if outputs and problem is not None and problem not in PROBLEMS:
        raise UserError(
            f"{source} has problem_type {problem!r} in its config.json: its head gives numbers "
            f"that are no scores of classes, which no command here reads"
        )
    if outputs == 1 and problem is None and config:
        notes.append(
            "The head has one output and config.json no problem_type, which is a regression to "
            "transformers: the probability of its one class is always 1 here."
        )
    names = _class_names(config, outputs)
    counts = {"id2label": config.get("id2label"), "num_labels": config.get("num_labels")}
    for name, value in counts.items() if outputs else ():
        count = len(value) if isinstance(value, dict) else value
        if type(count) is int and count != outputs:
            notes.append(
                f"config.json has {name} for {count} classes, but the head has {outputs} "
                f"outputs: {'its names are left out' if name == 'id2label' else 'not read'}."
            )
    return {"class_names": names, "multi_label": bool(outputs) and problem == PROBLEMS[1]}


def _class_names(config: dict[str, Any], num_classes: int) -> tuple[str, ...] | None:
    labels = config.get("id2label")
    if labels is None and isinstance(config.get("label2id"), dict):
        labels = {str(i): name for name, i in config["label2id"].items()}
    if not isinstance(labels, dict) or not num_classes:
        return None
    names = [labels.get(str(i)) for i in range(num_classes)]
    if len(labels) != num_classes or not all(isinstance(name, str) for name in names):
        return None
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return None  # Hugging Face's words for no names
    return tuple(map(str, names))
