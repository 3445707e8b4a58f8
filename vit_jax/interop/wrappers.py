"""Finds the weights of the image model in a file, and chooses among several.

Training code adds prefixes to the names of a network: those of dictionaries (`model`,
`state_dict`, `teacher`), of modules around it (`module.` of DDP, `_orig_mod.` of
torch.compile, `backbone.`, `net.`, `base_encoder.`), in any nesting. No list has them all, and
none is needed: what precedes the patch embedding is the prefix of a network.

Where a file holds two, one of them an average of the other over training, the average is read:
it is what timm loads, and what DINO's authors publish. MoCo's authors evaluate the other one.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vit_jax.interop.families import Arrays
from vit_jax.interop.huggingface_names import PATCHES, PREFIXES
from vit_jax.interop.weight_files import WRAPPERS
from vit_jax.system.errors import UserError

WEIGHTS = ("raw", "ema")
# How the name of one array ends that every network of a kind has, after the prefix; and what
# else must then be there, so that other networks are not mistaken for it.
_HUGGING_FACE = "|".join(re.escape(prefix) for prefix in sorted(PREFIXES, key=len)[::-1])
ANCHORS: dict[str, tuple[str, str]] = {
    "timm": (r"patch_embed\.proj\.weight", ""),
    "timm's Mixer": (r"stem\.proj\.weight", ""),
    "Hugging Face": (rf"(?:{_HUGGING_FACE}){re.escape(PATCHES)}", ""),
    "torchvision": (r"conv_proj\.weight", "encoder.pos_embedding"),
    "OpenCLIP": (r"conv1\.weight", "class_embedding"),
}
_AVERAGED = re.compile(
    r"(^|_)(ema|teacher|swa|avg|averaged?|polyak|momentum|target)(_|$)|^encoder_k$", re.I
)
_EVALUATED_RAW = re.compile(r"(^|_)momentum(_|$)|^encoder_k$")  # beside the average
_HEADS = {  # what arrays outside a network are, by the names of all of them
    "a projection head": r"(^|[._])(projector|projection(_head)?|proj_head|predictor)[._]|"
    r"(dino|ibot)_head\.|(^|\.)head\.(mlp|last_layer|\d+)\.",
    "a head outside the network": r"(^|\.)(head|classifier|fc|linear)\.(weight|bias)$",
}


class Chosen(NamedTuple):
    """The arrays of one network, without its prefix.

    Attributes:
      arrays: by their names inside the network.
      prefix: what stood before them, such as `teacher.backbone.`.
      notes: sentences about what else the file holds.
    """

    arrays: Arrays
    prefix: str
    notes: tuple[str, ...]


def prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the networks among arrays of these names; "" for nothing."""
    names, found = set(names), set[str]()
    for anchor, sibling in ANCHORS.values():
        pattern = re.compile(rf"(|.*?\.){anchor}")
        for name in names:
            match = pattern.fullmatch(name)
            if match and (not sibling or match[1] + sibling in names):
                found.add(match[1])
    return sorted(found)


def averaged(prefix: str) -> bool:
    """Whether a prefix says that what follows is an average over training."""
    return any(map(_AVERAGED.search, prefix.split(".")))


def choose(arrays: Arrays, weights: str | None, source: Path) -> Chosen:
    """The arrays of the network, or of the one that `weights` selects.

    Args:
      arrays: of a file, dictionaries in it joined by dots.
      weights: `raw` | `ema` (averaged over training); None: as the module says.
      source: for messages.

    Raises:
      UserError: there are several networks, or not the selected one.
    """
    if weights not in (None, *WEIGHTS):
        raise UserError(f"--weights={weights}: use one of {', '.join(WEIGHTS)}")
    found = prefixes(arrays)
    kinds = {kind: [p for p in found if averaged(p) == (kind == "ema")] for kind in WEIGHTS}
    wanted = weights or _usual(kinds)
    if not kinds[wanted] and weights == "ema":
        raise UserError(f"{source} holds no averaged weights: leave out --weights=ema")
    if not kinds[wanted] and found:
        raise UserError(f"{source} holds averaged weights alone: leave out --weights=raw")
    if not found:
        return Chosen(dict(arrays), "", ())
    prefix = _likeliest(kinds[wanted])
    if prefix is None:
        raise UserError(
            f"{source} holds {len(kinds[wanted])} networks, under "
            f"{', '.join(map(repr, kinds[wanted]))}: save the one that you mean by itself"
        )
    inside = _inside(arrays, prefix, found)
    others = [p for kind in WEIGHTS if kind != wanted for p in kinds[kind]]
    notes = _left_out(arrays, prefix, [prefix, *others], found)
    if others:
        notes.insert(0, _both(wanted, prefix, others))
    elif wanted == "ema" and "teacher" not in prefix:
        notes.insert(0, f"The weights are averaged over training ({_shown(prefix)}).")
    return Chosen({k.removeprefix(prefix): arrays[k] for k in inside}, prefix, tuple(notes))


def _likeliest(found: list[str]) -> str | None:
    """The network under the first usual prefix, where exactly one is; else None."""
    for word in ("", *WRAPPERS):
        under = [prefix for prefix in found if prefix.split(".")[0] == word]
        if under:
            return under[0] if len(under) == 1 else None
    return found[0] if len(found) == 1 else None


def _usual(kinds: dict[str, list[str]]) -> str:
    evaluated_raw = any(map(_EVALUATED_RAW.search, ".".join(kinds["ema"]).split(".")))
    return "ema" if kinds["ema"] and not (evaluated_raw and kinds["raw"]) else "raw"


def _inside(names: Iterable[str], prefix: str, found: list[str]) -> list[str]:
    """The names of one network, without those of another that lies within."""
    within = tuple(p for p in found if p != prefix and p.startswith(prefix))
    return [n for n in names if n.startswith(prefix) and not n.startswith(within)]


def _shown(prefix: str) -> str:
    return repr(prefix.rstrip(".")) if prefix else "at the top"


def _both(taken: str, prefix: str, others: list[str]) -> str:
    other = ", ".join(map(_shown, others))
    words = {"ema": "averaged over training", "raw": "as they were at the end of it"}
    rest = next(kind for kind in WEIGHTS if kind != taken)
    return (
        f"The file has weights {words[taken]} ({_shown(prefix)}), which are taken, and weights "
        f"{words[rest]} ({other}): --weights={rest} takes those."
    )


def _left_out(
    arrays: Iterable[str], prefix: str, networks: list[str], found: list[str]
) -> list[str]:
    """A sentence on the arrays of no network, if there are any."""
    known = {name for network in networks for name in _inside(arrays, network, found)}
    rest = sorted(name for name in arrays if name not in known)
    if not rest:
        return []
    kinds = [what for what, names in _HEADS.items() if all(re.search(names, n) for n in rest)]
    what = f" ({kinds[0]})" if kinds else ""
    return [f"Left out: {len(rest)} arrays outside {prefix!r}, such as {rest[0]}{what}."]
