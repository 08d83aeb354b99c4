"""What a PyTorch network answers, what its FDConv layers see, and what float32 costs there."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import Example, replace_layers, tensors_of
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.nn.heads.query_head import Decision, decisions

Arrays = dict[str, NDArray]
Act = Callable[[str, nn.Module, Tensor], Tensor]
# One unit in the last place of a float32.
UNIT = 2.0**-23
# Random changes tried: one may hardly matter by chance where another grows.
DRAWS = 3


@dataclass
class Seen:
    """A layer's input, in files of float32.

    Attributes:
        inputs: what the network in float32 computes.
        expected: what it computes from the same where the FDConv layers just before are in
            float64.
        shape: of both.
        off: how far the former is from the latter, and a third one is, whose layers' inputs were
            changed by `UNIT`.
    """

    inputs: Path
    expected: Path
    shape: tuple[int, ...] = ()
    off: float = 0.0


@dataclass
class Observation:
    """A network on one input: its answers, and what each use of a layer sees.

    Attributes:
        feed: the input.
        answers: in float32.
        expected: where each layer is in float64 and sees what it does in the float32 network.
        layers: by use.
        changed: see `Observer.change`.
        exact: see `Observer.in_double`.
        shifted: see `Observer.shift`.
    """

    feed: tuple[Tensor, ...]
    answers: Arrays
    expected: Arrays = field(default_factory=dict)
    layers: dict[str, Seen] = field(default_factory=dict)
    changed: list[Arrays] = field(default_factory=list)
    exact: Arrays | None = None
    shifted: Arrays | None = None


class Observer:
    """Runs a network and looks at its FDConv layers and its decisions.

    Args:
        network: in eval mode; not changed.
        folder: for layers' inputs, which together may be gigabytes.
    """

    def __init__(self, network: nn.Module, output_names: Sequence[str], folder: Path) -> None:
        self.network, self.output_names, self.folder = network, output_names, folder
        self.decisions = decisions(network)
        self.names = [*dynamic_layers(network), *self.decisions]
        self._act: Act = lambda _name, layer, x: layer(x)
        self._uses: Counter[str] = Counter()
        self._count = 0
        self._watched = replace_layers(network, lambda name, layer: _Watched(name, layer, self))
        for name, decision in self.decisions.items():
            self._watched.set_submodule(name, _Watched(name, decision, self))
        self._double: nn.Module | None = None
        self._runs_in_double = True

    def run(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Called in a layer's place."""
        self._uses[name] += 1
        use = name if self._uses[name] == 1 else f"{name}.use{self._uses[name]}"
        return self._act(use, layer, x)

    def _run(self, feed: tuple[Tensor, ...], act: Act) -> Arrays:
        self._act = act
        self._uses.clear()
        # Layers' inputs are overwritten, and one may be the network's own.
        return self._named(self._watched, tuple(tensor.clone() for tensor in feed))

    def _named(self, network: nn.Module, feed: tuple[Tensor, ...]) -> Arrays:
        outputs = outputs_of(network, feed)
        return {n: o.numpy() for n, o in zip(self.output_names, outputs, strict=True)}

    def answer(self, feed: tuple[Tensor, ...]) -> Observation:
        """The network's answers alone."""
        return Observation(feed, self._named(self.network, feed))

    def observe(self, feed: tuple[Tensor, ...]) -> Observation:
        """The network's answers, and what its layers see."""
        layers: dict[str, Seen] = {}
        stem = self.folder / f"seen{self._count}"
        self._count += 1

        def record(use: str, layer: nn.Module, x: Tensor) -> Tensor:
            number = len(layers)
            seen = Seen(Path(f"{stem}.{number}.in.npy"), Path(f"{stem}.{number}.ex.npy"))
            seen.shape = tuple(x.shape)
            np.save(seen.inputs, x.contiguous().numpy())
            layers[use] = seen
            return layer(x)

        def exact(use: str, layer: nn.Module, x: Tensor) -> Tensor:
            seen = layers[use]
            own = torch.from_numpy(np.load(seen.inputs))
            np.save(seen.expected, x.contiguous().numpy())
            seen.off = float((own - x).abs().max())
            _overwrite(x, own)
            if isinstance(layer, Decision):
                return layer(own)
            return copy.deepcopy(layer).double()(own.double()).to(x.dtype)

        observed = Observation(feed, self._run(feed, record), layers=layers)
        if layers:
            observed.expected = self._run(feed, exact)
        return observed

    def shift(self, observed: Observation) -> None:
        """Measure what `UNIT` of each layer's input changes just behind the layer."""
        if observed.shifted is not None:
            return

        def act(use: str, layer: nn.Module, x: Tensor) -> Tensor:
            seen = observed.layers[use]
            expected = torch.from_numpy(np.load(seen.expected))
            seen.off = max(seen.off, float((expected - x).abs().max()))
            own = torch.from_numpy(np.load(seen.inputs))
            _overwrite(x, own)
            return layer(own if isinstance(layer, Decision) else _shifted(own, use))

        observed.shifted = self._run(observed.feed, act)

    def change(self, observed: Observation) -> list[Arrays]:
        """What `UNIT` of each layer's input, or of the network's own, makes of the answers."""
        for draw in range(len(observed.changed), DRAWS):
            feed = observed.feed
            if not self.names:
                feed = (_shifted(feed[0], f"input{draw}"), *feed[1:])

            def act(use: str, layer: nn.Module, x: Tensor, draw: int = draw) -> Tensor:
                return layer(_shifted(x, f"{use}{draw}"))

            observed.changed.append(self._run(feed, act))
        return observed.changed

    def in_double(self, observed: Observation) -> Arrays | None:
        """The answers in float64, or None: the network does not run in float64."""
        if observed.exact is None and self._runs_in_double:
            try:
                self._double = self._double or copy.deepcopy(self.network).double()
                feed = tuple(tensor.double() for tensor in observed.feed)
                observed.exact = self._named(self._double, feed)
            except (ExportError, RuntimeError):
                self._double, self._runs_in_double = None, False
        return observed.exact


class _Watched(nn.Module):
    """Stands in a layer's place and lets an observer run it."""

    def __init__(self, name: str, layer: nn.Module, observer: Observer) -> None:
        super().__init__()
        self.name, self.layer, self.run = name or "layer", layer, observer.run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.name, self.layer, x)


def _overwrite(x: Tensor, own: Tensor) -> None:
    """Let all who read ``x`` hereafter, a shortcut for one, read what the network computed."""
    if 0 not in x.stride():  # else several of its values are one
        x.copy_(own)


def _shifted(x: Tensor, seed: str) -> Tensor:
    """Every channel a unit larger or smaller, as a sum in another order may leave its mean."""
    generator = torch.Generator().manual_seed(sum(seed.encode()))
    signs = torch.randint(0, 2, x.shape[:2], generator=generator) * 2 - 1
    return x * (1 + UNIT * signs.reshape(*x.shape[:2], *[1] * (x.ndim - 2)).to(x.dtype))


def answer_of(network: nn.Module, example: Example) -> Any:
    """Whatever the network answers.

    Raises:
        ExportError: it does not take the example.
    """
    inputs = tensors_of(example)
    try:
        with torch.no_grad():
            return network(*inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise ExportError(f"the network does not take inputs of shape {shapes}: {error}") from error


def outputs_of(network: nn.Module, example: Example) -> list[Tensor]:
    """The outputs of a network that gives a tensor, or several in a tuple or list.

    Raises:
        ExportError: it does not take the example.
    """
    answer = answer_of(network, example)
    return [answer] if isinstance(answer, Tensor) else list(answer)
