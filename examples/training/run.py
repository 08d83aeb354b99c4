"""A training that can be stopped and started again."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from fdconv_deploy.demo import assets_folder

STOPPED = "stopped before the end; the same command goes on from here"
console = Console(highlight=False, soft_wrap=True)


class Recipe(Protocol):
    """What every recipe has; all of its fields are compared when a training goes on."""

    @property
    def steps(self) -> int: ...

    @property
    def scenes(self) -> int: ...

    @property
    def seed(self) -> int: ...


R = TypeVar("R", bound=Recipe)


def add_arguments(parser: argparse.ArgumentParser, standard: Recipe, work: Path) -> None:
    """What every training may be told."""
    parser.add_argument("--steps", type=int, default=standard.steps)
    parser.add_argument("--scenes", type=int, default=standard.scenes, help="training scenes")
    parser.add_argument("--seed", type=int, default=standard.seed)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop each network after")
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--out", type=Path, default=assets_folder())


def recipe_of(standard: R, given: argparse.Namespace) -> R:
    """The recipe that `add_arguments`' options ask for; their folder of work is made."""
    given.work.mkdir(parents=True, exist_ok=True)
    return replace(standard, steps=given.steps, scenes=given.scenes, seed=given.seed)  # type: ignore[type-var]


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON would hold it."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(recipe).items()}


def load_state(path: Path) -> dict[str, Any]:
    """Read a state that a `Run` wrote."""
    state: dict[str, Any] = torch.load(path, weights_only=True)  # noqa: TID251 (own file, weights only)
    return state


def cosine(peak: float, step: int, steps: int, warm_up: int) -> float:
    """The learning rate: a linear warm-up, then half a cosine down to nothing."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


class Run:
    """Steps of one network, from where the state in ``work`` has it.

    The state goes to ``<name>.state`` there every minute and when the steps end.

    :param start: its first step.
    :param end: the one after its last.
    :raises SystemExit: the state was made by another recipe.
    """

    def __init__(
        self,
        name: str,
        work: Path,
        recipe: Recipe,
        network: nn.Module,
        optimiser: torch.optim.Optimizer,
        start: int,
        end: int,
    ) -> None:
        self._name, self._path, self._recipe = name, work / f"{name}.state", describe(recipe)
        self._network, self._optimiser = network, optimiser
        self._step, self._end, self._seconds = start, end, 0.0
        self._began = time.monotonic()
        self._recent: list[dict[str, float]] = []
        if self._path.exists():
            self._go_on(load_state(self._path))

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self._step >= self._end

    def steps(self, minutes: float) -> Iterator[int]:
        """The number of each step to take, until the last or the end of so many minutes.

        Each must `learn` once.
        """
        self._began = saved = time.monotonic()
        while not self.done and time.monotonic() - self._began < 60 * minutes:
            yield self._step
            if time.monotonic() - saved > 60:
                self._save()
                saved = time.monotonic()
        if self._recent:
            self._save()

    def learn(
        self, rate: float, loss: Tensor, told: Mapping[str, Tensor], largest_gradient: float
    ) -> None:
        """Take the step.

        :param rate: the learning rate, which a group's ``factor`` multiplies.
        :param told: parts of the loss to say now and then.
        :param largest_gradient: norm beyond which gradients are clipped.
        """
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), largest_gradient)
        self._optimiser.step()
        self._step += 1
        self._recent.append({name: value.item() for name, value in told.items()})
        if self._step % 50 == 0 or self.done:
            self._say()

    def _say(self) -> None:
        pace = (time.monotonic() - self._began) / len(self._recent)
        last = self._recent[-50:]
        shown = "  ".join(f"{key} {sum(r[key] for r in last) / len(last):.3f}" for key in last[0])
        console.print(f"{self._name} step {self._step}/{self._end}  {shown}  {pace:.2f} s/step")

    def _go_on(self, state: dict[str, Any]) -> None:
        if state["recipe"] != self._recipe:
            raise SystemExit(
                f"{self._path} was trained by another recipe. Move it away, or give its."
            )
        self._network.load_state_dict(state["network"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._step, self._seconds = state["step"], state["seconds"]

    def _save(self) -> None:
        content = {
            "recipe": self._recipe,
            "network": self._network.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "step": self._step,
            "seconds": self._seconds + time.monotonic() - self._began,
        }
        unfinished = self._path.with_suffix(".part")
        torch.save(content, unfinished)
        unfinished.replace(self._path)
