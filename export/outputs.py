"""Whatever a module answers, nested or not, as a flat tuple of tensors with names."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fdconv_deploy.export.validation.reference import answer_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fdconv_deploy.errors import ExportError


@dataclass(frozen=True)
class _Chosen:
    """A forward hook that gives some leaves of an answer, in PyTorch's order of leaves."""

    places: tuple[int, ...]

    def __call__(self, module: nn.Module, inputs: Any, answer: Any) -> tuple[Tensor, ...]:
        leaves, _ = pytree.tree_flatten(answer)
        return tuple(leaves[place] for place in self.places)


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

    Returns:
        The module itself where its answer is flat already, else a shallow copy of it, of the
        same submodules. A ``None`` in an answer is left out, which ``progress`` reports.

    Raises:
        ExportError: the module does not run on the example, an output is not a tensor, or names
            are unknown, ambiguous, or more or fewer than outputs.
    """
    answer = answer_of(module, example)
    paths = pytree.tree_flatten_with_path(answer)[0]
    leaves = [(_name(path), leaf) for path, leaf in paths]
    if len(leaves) == 1 and all(isinstance(key, pytree.SequenceKey) for key in paths[0][0]):
        leaves = [("output", leaves[0][1])]
    places = _places(leaves, chosen, progress)
    for name, leaf in (leaves[place] for place in places):
        if not isinstance(leaf, Tensor):
            raise ExportError(
                f"a module's outputs must be tensors, and its output {name!r} is "
                f"{_described(leaf)}. {_choice(leaves)}"
            )
    own = [leaves[place][0] for place in places]
    names = own if given is None else list(given)
    if len(names) != len(own):
        raise ExportError(f"the module has {len(own)} outputs, output_names names {len(names)}.")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or "" in names:
        raise ExportError(
            f"outputs need names of their own, and these are {names}. Give output_names=[...], one "
            "for each."
        )
    flat = isinstance(answer, Tensor) or (
        isinstance(answer, list | tuple)
        and places == list(range(len(answer)))
        and all(isinstance(leaf, Tensor) for leaf in answer)
    )
    if flat:
        return module, names
    # A hook, not a wrapper: layers keep the names that users know them by.
    hooked = copy.copy(module)
    hooks: OrderedDict[int, Callable] = OrderedDict(module._forward_hooks)
    hooks[max(hooks, default=-1) + 1] = _Chosen(tuple(places))
    hooked._forward_hooks = hooks
    return hooked, names


def _name(path: Sequence[Any]) -> str:
    """Where a leaf stands: keys and places, joined by dots."""
    parts = [
        str(getattr(key, "key", getattr(key, "name", None)))
        if not isinstance(key, pytree.SequenceKey)
        else str(key.idx)
        for key in path
    ]
    if path and isinstance(path[0], pytree.SequenceKey):
        parts[0] = f"output{parts[0]}"
    return ".".join(parts)


def _places(
    leaves: list[tuple[str, Any]], chosen: Sequence[str] | None, progress: Callable[[str], None]
) -> list[int]:
    if chosen is None:
        for name, leaf in leaves:
            if leaf is None:
                progress(f"note: the module's output {name!r} is None, and left out")
        places = [place for place, (_, leaf) in enumerate(leaves) if leaf is not None]
        if not places:
            raise ExportError("the module has no output: there is no tensor in its answer.")
        return places
    own = [name for name, _ in leaves]
    if not chosen:
        raise ExportError(f"outputs must name one or more. {_choice(leaves)}")
    for name in chosen:
        if own.count(name) != 1:
            found = "several outputs" if name in own else "no output"
            raise ExportError(f"the module has {found} called {name!r}. {_choice(leaves)}")
    return [own.index(name) for name in chosen]


def _choice(leaves: list[tuple[str, Any]]) -> str:
    names = ", ".join(repr(name) for name, leaf in leaves if isinstance(leaf, Tensor))
    if not names:
        return "Wrap the module in one that gives tensors."
    return f"Choose with outputs=[...]; its tensors are {names}."


def _described(leaf: Any) -> str:
    kind = type(leaf).__name__
    return f"{kind} {leaf!r}" if isinstance(leaf, bool | int | float) else f"of type {kind}"
