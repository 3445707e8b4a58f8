"""Parameter groups: factors of the learning rate and of the decay, and what is frozen."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.distributed.sharding import path_name
from vit_jax.objectives.objective import FOREVER, Group
from vit_jax.system.errors import UserError

DEFAULT = Group(".*")


class Groups:
    """The groups of an objective, as functions of trees like its parameters.

    Without groups every function returns what it is given: a program has nothing of them.
    """

    def __init__(self, groups: tuple[Group, ...]):
        self._groups = groups

    def of(self, path: str) -> Group:
        """The first group that fits a path, else one that changes nothing."""
        fits = lambda group: re.fullmatch(f"(.*/)?({group.pattern})", path)
        return next(filter(fits, self._groups), DEFAULT)

    def of_gradients(self, grads: Any, step: jax.Array) -> Any:
        """Zeros where nothing is to be learned at this step."""
        return self._map(lambda group, x: _unless_frozen(group, x, step), grads)

    def of_updates(self, updates: Any, step: jax.Array) -> Any:
        """The updates times the factor of their learning rate; none where they are frozen.

        Raises:
          UserError: there are other factors than layers.
        """

        def change(group: Group, x: jax.Array) -> jax.Array:
            return _unless_frozen(group, _times(group, x), step)

        return self._map(change, updates)

    def decays(self, params: Any) -> Any:
        """The factor of the weight decay of each array; 0 where it is frozen for good."""
        factor = lambda group, _: 0.0 if group.frozen_until >= FOREVER else group.decay
        return self._map(factor, params)

    def check(self, params: Any) -> None:
        """Refuses patterns that fit nothing, and factors that fit no layers.

        Args:
          params: arrays or their shapes.

        Raises:
          UserError: with the pattern.
        """
        used = set()

        def look(path: Any, x: Any) -> None:
            group = self.of(path_name(path))
            used.add(group)
            if isinstance(group.lr, tuple) and x.shape[:1] != (len(group.lr),):
                raise UserError(
                    f"the parameter group {group.pattern!r} has {len(group.lr)} factors of the "
                    f"learning rate, but {path_name(path)} has shape {x.shape}: give one for "
                    f"each layer of a scanned encoder"
                )

        jax.tree_util.tree_map_with_path(look, params)
        for group in self._groups:
            if group not in used:
                raise UserError(
                    f"the parameter group {group.pattern!r} fits no parameter that no group "
                    f"before it fits: mend its pattern, or leave it out"
                )

    def __bool__(self) -> bool:
        return bool(self._groups)

    def _map(self, function: Callable[[Group, Any], Any], tree: Any) -> Any:
        if not self._groups:
            return tree
        return jax.tree_util.tree_map_with_path(
            lambda path, x: function(self.of(path_name(path)), x), tree
        )


def _times(group: Group, x: jax.Array) -> jax.Array:
    if isinstance(group.lr, tuple):
        factors = np.array(group.lr, np.float32).reshape(-1, *[1] * (x.ndim - 1))
        return x * jnp.asarray(factors, x.dtype)
    return x if group.lr == 1.0 else x * group.lr


def _unless_frozen(group: Group, x: jax.Array, step: jax.Array) -> jax.Array:
    if group.frozen_until <= 0:
        return x
    if group.frozen_until >= FOREVER:
        return jnp.zeros_like(x)
    return jnp.where(step < group.frozen_until, jnp.zeros_like(x), x)


NO_GROUPS = Groups(())
