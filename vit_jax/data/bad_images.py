"""Bad images are left out and counted, each reported by name, until there are too many.

In training the next good image of the source replaces a bad one, in evaluation nothing does.
Which one it is depends on the data set alone, so that batches stay the same whatever the number
of threads and processes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vit_jax.data.decode import BadImage, decode
from vit_jax.data.image_cache import Kept
from vit_jax.data.sources.source import Source
from vit_jax.system.errors import UserError

_told: set[str] = set()  # a repeated evaluation need not report it again

NONE = -1  # in place of the index of a bad image
DEFAULT_SHARE = 0.01  # of a data set may be bad


class BadImages:
    """The bad images of a source that were found so far.

    `try_out` does with an example what fails for a bad one.
    """

    def __init__(
        self,
        source: Source,
        limit: int,
        try_out: Callable[[dict[str, Any]], object] = lambda example: decode(example, None),
    ) -> None:
        self.source, self.limit, self.try_out = source, limit, try_out
        self.reasons: dict[int, str] = {}  # by position in the source

    def add(self, i: int, reason: str | None = None) -> None:
        """Counts the image at position i, and reports it on stderr, once in a process.

        Raises:
          UserError: there are more than `limit` now.
        """
        if i in self.reasons:
            return
        # Only its position comes out of a worker process, so what is wrong with it is found
        # again.
        self.reasons[i] = reason or self._reason(i)
        count = len(self.reasons)
        if count > self.limit:
            raise UserError(
                f"{self.reasons[i].removesuffix('.')}: of {len(self.source)} images at least "
                f"{count} cannot be used, and {self.limit} are allowed."
            )
        if self.reasons[i] not in _told:
            _told.add(self.reasons[i])
            print(f"left out ({count}): {self.reasons[i]}", file=sys.stderr, flush=True)

    def _reason(self, i: int) -> str:
        try:
            self.try_out(self.source[i])
        except BadImage as error:
            return str(error)
        return f"image {self.source[i]['name']} could not be decoded before, but now can."


@dataclass(frozen=True)
class Replacing:
    """Decoded images, with a good one in place of each bad one.

    Examples have `bad` beside `image`, `label` and `name`: the position of the image that was
    requested if another replaces it, else `NONE`.
    """

    source: Kept
    limit: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Raises UserError if more than `limit` bad images follow each other."""
        return self.good(i, lambda example: example)

    def good(self, i: int, use: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """The result of `use` for example i, or for the next one for which it has a result.

        Raises UserError as above; `use` raises BadImage for what it cannot use.
        """
        i = range(len(self))[i]
        for tries in range(min(self.limit + 1, len(self))):
            try:
                example = self.source[(i + tries) % len(self)]
                return use({**example, "bad": i if tries else NONE})
            except BadImage as error:
                failure = error
        raise failure
