"""What the user states about weights, because their file does not say it.

One definition of these flags for every command that opens weights.
"""

from typing import Any, NamedTuple

from vit_jax.system.errors import UserError


class Stated(NamedTuple):
    """Arguments of `interop.load.load_weights`, None where not stated."""

    image_size: tuple[int, int] | None = None  # (H, W) that positions are for, in pixels
    num_heads: int | None = None
    family: str | None = None
    pool: str | None = None
    weights: str | None = None

    def check_unused(self, name: str) -> None:
        """Refuses these arguments for our own weights, which contain all of them.

        Raises:
          UserError: something was stated about `name`.
        """
        said = {"source_image_size" if f == "image_size" else f: x for f, x in self._by_name()}
        if given := [f"--{flag}" for flag, value in said.items() if value is not None]:
            raise UserError(
                f"{', '.join(given)} describes weights of other projects, but {name} was "
                f"written by vit_jax, which stores it: leave it out"
            )

    def _by_name(self) -> list[tuple[str, Any]]:
        return list(self._asdict().items())


NOTHING = Stated()
