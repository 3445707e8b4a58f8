"""Published weights of any family, recognised by what is in the file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError
from vit_jax.interop import files, google, huggingface, timm, timm_hybrid
from vit_jax.interop.families import Imported

__all__ = ["Imported", "load_weights"]


def load_weights(
    path: Path, image_size: tuple[int, int] | None = None, num_heads: int | None = None
) -> Imported:
    """Reads somebody else's weights.

    Args:
      path: an `.npz`, `.safetensors` or PyTorch file, or a folder with a `config.json`. Names
        decide nothing; a `config.json` beside a file is used.
      image_size: (height, width) that position embeddings, or the token mixing of a Mixer,
        were made for; needed where that is not a square and nothing in the file says so.
      num_heads: where the file does not say it and its width does not give it away.

    Raises:
      UserError: the file cannot be read, is none of our models, or is one that our model
        cannot hold exactly.
    """
    path = Path(path)
    config = huggingface.config_beside(path)
    if path.is_dir():
        arrays, origin = huggingface.read_folder(path)
    else:
        arrays, origin = files.read(path)
    if google.recognises(arrays):
        return google.read(arrays, path, image_size)
    if huggingface.recognises(arrays):
        return huggingface.read(arrays, path, config, image_size, num_heads)
    if timm_hybrid.recognises_mixer(arrays):
        return timm_hybrid.read_mixer(arrays, path, config, image_size)
    if timm_hybrid.recognises(arrays):  # before those that it is built on
        return timm_hybrid.read(arrays, path, config, image_size, num_heads)
    if timm.recognises(arrays):
        said = _said(path, origin)
        size, heads = said.pop("image_size", None), said.pop("num_heads", None)
        size, heads = image_size or size, num_heads or heads
        found = timm.read(arrays, path, config, origin, size, heads)
        return dataclasses.replace(found, cfg=dataclasses.replace(found.cfg, **said))
    names = ", ".join(sorted(arrays)[:4])
    raise UserError(
        f"{path} has no Vision Transformer of a known family: it holds {len(arrays)} arrays "
        f"such as {names}"
    )


def _said(path: Path, origin: str) -> dict[str, Any]:
    """What a file that `timm.write` wrote says about the network, beside its arrays."""
    if origin != "safetensors" or path.is_dir():
        return {}
    try:
        said = json.loads(files.safetensors_metadata(path).get("vit_jax", "{}"))
        said = {name: said[name] for name in timm.SAID if name in said}
        if "image_size" in said:
            height, width = said["image_size"]
            said["image_size"] = (int(height), int(width))
        return said
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} has a header that vit_jax did not write: {error}") from error
