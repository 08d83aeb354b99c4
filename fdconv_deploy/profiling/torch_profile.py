"""Where a PyTorch network's time goes on a CPU, layer by layer.

One clock runs all the time and is switched to another layer and part at every boundary, so the
parts add up to the whole. What runs between two convolutions (normalisation, activation, an
addition) goes with the first of them, as in an exported graph, where most of it is folded into
that convolution.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fdconv_deploy.nn.fdconv import FDConv2d
from fdconv_deploy.profiling.onnx_profile import WARM_UP, LayerTimes

Place = tuple[str, str]
BEFORE = "before the first convolution"


class _Clock:
    """Seconds by (layer, part), by a clock such as `time.perf_counter`."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self.start()

    def start(self) -> None:
        self.spent: defaultdict[Place, float] = defaultdict(float)
        self.at: Place = (BEFORE, "rest")
        self._last = self._seconds()

    def switch(self, place: Place) -> None:
        now = self._seconds()
        self.spent[self.at] += now - self._last
        self.at, self._last = place, now


class ProfiledNetwork:
    """A network that notes what each of its layers takes.

    Args:
        network: on the CPU, in eval mode. It is as it was after each run.
        clock: seconds, as `time.perf_counter` gives them.
    """

    def __init__(self, network: nn.Module, clock: Callable[[], float] = time.perf_counter) -> None:
        self._network, self._clock = network, _Clock(clock)
        self._runs: list[dict[Place, float]] = []

    def run(self, inputs: tuple[Tensor, ...]) -> None:
        """Run once."""
        clock = self._clock
        with torch.inference_mode(), _switching(self._network, clock):
            clock.start()
            self._network(*inputs)
            clock.switch(clock.at)
        self._runs.append({place: seconds * 1e3 for place, seconds in clock.spent.items()})

    def layers(self, warm_up: int = 0) -> list[LayerTimes]:
        """Milliseconds by part for every layer, in the order they run: medians over the runs.

        Args:
            warm_up: the first of them, which do not count.
        """
        counted = self._runs[warm_up:]
        layers: dict[str, dict[str, float]] = {}
        for layer, part in counted[0]:
            spent = [run[layer, part] for run in counted]
            layers.setdefault(layer, {})[part] = statistics.median(spent)
        return [LayerTimes(name, ms) for name, ms in layers.items()]


def profile_network(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    runs: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> list[LayerTimes]:
    """Milliseconds by part for every layer. See `ProfiledNetwork`.

    Args:
        runs: that count, after two that do not.
    """
    profiled = ProfiledNetwork(network, clock)
    for _ in range(runs + WARM_UP):
        profiled.run(inputs)
    return profiled.layers(WARM_UP)


@contextmanager
def _switching(network: nn.Module, clock: _Clock) -> Iterator[None]:
    """Let a network's layers switch the clock."""
    with ExitStack() as stack:
        inside: set[nn.Module] = set()
        for name, module in network.named_modules():
            if module in inside or not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            inside.update(module.modules())
            stack.callback(_around(module, clock, (name, "convolutions"), (name, "rest")))
            if isinstance(module, FDConv2d) and module.is_dynamic:
                back = (name, "convolutions")
                for method, part in (("attention", "attention"), ("kernels", "kernel assembly")):
                    stack.callback(_wrapped(module, method, clock, (name, part), back))
                if module.FBM is not None:
                    place = (name, "band modulation")
                    stack.callback(_around(module.FBM, clock, place, back))
        yield


def _around(module: nn.Module, clock: _Clock, within: Place, after: Place) -> Callable[[], None]:
    """Switch before and after a module's forward pass; what undoes it."""

    def enter(_module: nn.Module, _inputs: Any) -> None:
        clock.switch(within)

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        clock.switch(after)

    handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _wrapped(
    module: nn.Module, method: str, clock: _Clock, within: Place, after: Place
) -> Callable[[], None]:
    """Switch around one of a module's methods; what undoes it."""
    original = getattr(module, method)

    def timed(*arguments: Any, **named: Any) -> Any:
        clock.switch(within)
        try:
            return original(*arguments, **named)
        finally:
            clock.switch(after)

    module.__dict__[method] = timed
    return lambda: module.__dict__.pop(method, None)
