"""Checkpoints as earlier versions wrote them.

Layout 1 had the parameters of an objective among those of the model, under the name of the one
objective that had any. Layout 2 has `{"model": ..., "objective": ...}`, so that a model is
opened without knowing its objective. A card without `layout` is of layout 1.
"""

from typing import Any

import jax

from vit_jax.checkpoints.metadata import Card

LAYOUT = 2
_OBJECTIVE = "masked_patches"


def layout(card: Card) -> int:
    return int(card.get("layout", 1))


def _is_params(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.keys() == {"model", "objective"}


def to_layout_1(tree: Any) -> Any:
    """A state, or weights, with all `{"model", "objective"}` in it as layout 1 has them."""

    def one(params: Any) -> Any:
        if not _is_params(params):
            return params
        own = {_OBJECTIVE: params["objective"]} if params["objective"] else {}
        return {**params["model"], **own}

    return jax.tree.map(one, tree, is_leaf=_is_params)


def from_layout_1(tree: Any, target: Any) -> Any:
    """The inverse: the arrays of `tree` where `target`, of layout 2, has them."""

    def one(wanted: Any, params: Any) -> Any:
        if not _is_params(wanted):
            return params
        model = {name: x for name, x in params.items() if name != _OBJECTIVE}
        return {"model": model, "objective": params.get(_OBJECTIVE, {})}

    return jax.tree.map(one, target, tree, is_leaf=_is_params)
