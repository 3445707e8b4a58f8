"""The names of splits, and parts of them.

Every source takes the split grammar of TensorFlow Datasets: `train`, `train[:98%]`,
`train[10%:]`, `train[100:200]`, `train[-10:]` and sums such as `train+validation[:50%]`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vit_jax.data.sources.source import Source, Subset
from vit_jax.system.errors import UserError

# What splits are called, in any case; names of one kind mean the same.
_SPLIT_KINDS = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}


SPLITS = tuple(name for names in _SPLIT_KINDS.values() for name in names)


# For these names the only held-out split is used, whatever it is called.
_ANY_HELD_OUT = ("val", "validation", "test")


@dataclass(frozen=True)
class SubSplit:
    """`base[start:stop]`, each bound a count or a percentage of the base split."""

    text: str
    base: str
    start: str | None = None
    stop: str | None = None

    def of(self, source: Source) -> Source:
        """The part of `source`, which is the whole base split."""
        if self.start is None and self.stop is None:
            return source
        n = len(source)
        start, stop = self._index(self.start, 0, n), self._index(self.stop, n, n)
        if start >= stop:
            raise UserError(
                f"split {self.text!r} holds no examples, because {self.base!r} has {n}; "
                "widen its bounds."
            )
        return Subset(source, start, stop)

    def _index(self, bound: str | None, default: int, n: int) -> int:
        if bound is None:
            return default
        # The closest index, halves to even, as TensorFlow Datasets rounds.
        index = round(int(bound[:-1]) * n / 100) if bound.endswith("%") else int(bound)
        index = index + n if bound.startswith("-") else index
        if not 0 <= index <= n:
            raise UserError(
                f"split {self.text!r} reaches outside {self.base!r}, which has {n} examples; "
                f"bounds lie between -{n} and {n}, or -100% and 100%."
            )
        return index


def parse_split(text: str) -> SubSplit:
    bound = r"(-?\d+%?)?"
    match = re.fullmatch(rf"\s*([\w.-]+)(?:\[\s*{bound}\s*:\s*{bound}\s*\])?\s*", text)
    if match is None:
        raise UserError(
            f"split {text!r} is not understood; write it like train, train[:98%], "
            "train[10%:] or train[100:200]."
        )
    return SubSplit(text.strip(), *match.groups())


def split_kind(name: str) -> str | None:
    """`train`, `validation` or `test` if that is what `name` means, in any case."""
    for kind, names in _SPLIT_KINDS.items():
        if name.casefold() in names:
            return kind
    return None


def in_order(splits: Iterable[str]) -> tuple[str, ...]:
    """Splits with the one to train on first, by name."""
    return tuple(sorted(splits, key=lambda name: (split_kind(name) != "train", name)))


def pick_split(requested: str, available: Sequence[str], where: str) -> str:
    """The available split that `requested` means.

    `val`, `validation`, `valid` and `dev` are one name, in any case; `test` is another, unless
    only one set is held out. Raises UserError, listing what exists.
    """
    if requested in available:
        return requested
    kind = split_kind(requested)
    same = [name for name in available if kind and split_kind(name) == kind]
    same = same or [name for name in available if name.casefold() == requested.casefold()]
    if not same and requested.casefold() in _ANY_HELD_OUT:
        same = [name for name in available if split_kind(name) in ("validation", "test")]
    if len(same) == 1:
        return same[0]
    raise UserError(f"{where} has no split {requested!r}; it has {', '.join(available)}.")


def split_options(argument: str, names: Sequence[str], kind: str) -> tuple[str, dict[str, str]]:
    """`PATH,label=breed` -> the path and `{"label": "breed"}`, of the options `names`.

    Raises UserError for an option twice or without a value.
    """
    option = rf",\s*({'|'.join(names)})=([^,]*)"
    match = re.fullmatch(rf"(.*?)((?:{option})*)", argument, re.DOTALL)
    assert match is not None  # the path takes all that is no option
    found = re.findall(option, match[2])
    options = {name: value.strip() for name, value in found}
    if len(options) < len(found) or not all(options.values()):
        raise UserError(
            f"{kind}:{argument} has an option without a value, or one twice; write it like "
            f"{kind}:PATH,{names[0]}=NAME."
        )
    return match[1], options
