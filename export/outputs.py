"""Whatever a module answers, nested or not, as a flat tuple of tensors with names."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from fdconv_deploy.export.validation.reference import answer_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fdconv_deploy.errors import ExportError

Leaves = list[tuple[str, Any]]


def flatten_outputs(
    module: nn.Module,
    example: Tensor,
    *,
    chosen: Sequence[str] | None = None,
    given: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[nn.Module, list[str]]:
    """The module with its answer as a flat tuple of tensors, and a name for each.

    Args:
        module: gives a tensor, or tensors in tuples, lists, dicts, named tuples and whatever
            else PyTorch's pytree knows, nested at will.
        example: what it is run on.
        chosen: names of the outputs to keep, in this order; all of them if not given.
        given: names for the outputs, in place of their own: ``output`` for a module of one, else
            where an output stands: ``output0``, ``boxes``, ``output1.feats.2``.
        progress: called with a sentence for each ``None`` in the answer, which is left out.

    Returns:
        The module itself where its answer is flat already, else a shallow copy of it, of the
        same submodules.

    Raises:
        ExportError: the module does not run on the example, an output is not a tensor, or names
            are unknown, ambiguous, or more or fewer than outputs.
    """
    answer = answer_of(module, example)
    paths = pytree.tree_flatten_with_path(answer)[0]
    leaves = [(_name(path), leaf) for path, leaf in paths]
    if len(leaves) == 1 and all(isinstance(key, pytree.SequenceKey) for key in paths[0][0]):
        leaves = [("output", leaves[0][1])]
    places = _all(leaves, progress) if chosen is None else _chosen(leaves, chosen)
    for name, leaf in (leaves[place] for place in places):
        if not isinstance(leaf, Tensor):
            kind = type(leaf).__name__
            plain = isinstance(leaf, bool | int | float)
            found = f"{kind} {leaf!r}" if plain else f"of type {kind}"
            raise ExportError(
                f"a module's outputs must be tensors, and its output {name!r} is {found}. "
                f"{_choice(leaves)}"
            )
    names = [leaves[place][0] for place in places] if given is None else list(given)
    if len(names) != len(places):
        raise ExportError(f"the module has {len(places)} outputs, output_names names {len(names)}.")
    if "" in names or max(Counter(names).values()) > 1:
        raise ExportError(
            f"outputs need names of their own, and these are {names}. Give output_names=[...], one "
            "for each."
        )
    if isinstance(answer, Tensor) or (
        isinstance(answer, list | tuple)
        and places == list(range(len(answer)))
        and all(isinstance(leaf, Tensor) for leaf in answer)
    ):
        return module, names

    def flat(_module: nn.Module, _inputs: Any, answer: Any) -> tuple[Tensor, ...]:
        found = pytree.tree_leaves(answer)
        return tuple(found[place] for place in places)

    # A hook, not a wrapper: layers keep the names that users know them by.
    hooked = copy.copy(module)
    hooked._forward_hooks = OrderedDict(module._forward_hooks)
    hooked.register_forward_hook(flat)
    return hooked, names


def _name(path: Sequence[Any]) -> str:
    """Where a leaf stands: keys and places, joined by dots."""
    # A place in a sequence, a dict's key, or a named tuple's field.
    parts = [
        str(next(getattr(key, n) for n in ("idx", "key", "name") if hasattr(key, n)))
        for key in path
    ]
    if path and isinstance(path[0], pytree.SequenceKey):
        parts[0] = f"output{parts[0]}"
    return ".".join(parts)


def _all(leaves: Leaves, progress: Callable[[str], None]) -> list[int]:
    for name, leaf in leaves:
        if leaf is None:
            progress(f"note: the module's output {name!r} is None, and left out")
    places = [place for place, (_, leaf) in enumerate(leaves) if leaf is not None]
    if not places:
        raise ExportError("the module has no output: there is no tensor in its answer.")
    return places


def _chosen(leaves: Leaves, chosen: Sequence[str]) -> list[int]:
    own = [name for name, _ in leaves]
    if not chosen:
        raise ExportError(f"outputs must name one or more. {_choice(leaves)}")
    for name in chosen:
        if own.count(name) != 1:
            found = "several outputs" if name in own else "no output"
            raise ExportError(f"the module has {found} called {name!r}. {_choice(leaves)}")
    return [own.index(name) for name in chosen]


def _choice(leaves: Leaves) -> str:
    names = ", ".join(repr(name) for name, leaf in leaves if isinstance(leaf, Tensor))
    if not names:
        return "Wrap the module in one that gives tensors."
    return f"Choose with outputs=[...]; its tensors are {names}."
