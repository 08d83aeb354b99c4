"""How the baselines are trained."""

from __future__ import annotations

from dataclasses import dataclass

from examples.training.run import cosine


@dataclass(frozen=True)
class Recipe:
    """All that decides how a network comes out, the architecture apart.

    Two cycles of falling learning rate. The base learns from small crops, by cross-entropy
    that favours rare classes. The two networks' cycle, the last third of the steps, sees larger
    crops and adds a soft Jaccard loss: favouring made people and poles fat, and IoU is what
    is scored.
    """

    steps: int = 3900
    batch: int = 8
    crop: tuple[int, int] = (128, 176)
    learning_rate: float = 2e-3
    second_crop: tuple[int, int] = (160, 224)
    second_learning_rate: float = 1e-3
    attention_factor: float = 3.0
    weight_decay: float = 0.01
    warm_up: int = 100
    auxiliary_weight: float = 0.4
    scenes: int = 2000
    seed: int = 0

    @property
    def turn(self) -> int:
        """The two networks' first step."""
        return 2 * self.steps // 3

    def span(self, name: str) -> tuple[int, int]:
        """A network's first step and the one after its last."""
        return (0, self.turn) if name == "base" else (self.turn, self.steps)


def rate(recipe: Recipe, step: int) -> float:
    """Learning rate: in each cycle a linear warm-up, then half a cosine down to nothing."""
    first = step < recipe.turn
    peak = recipe.learning_rate if first else recipe.second_learning_rate
    start, end = recipe.span("base" if first else "twins")
    return cosine(peak, step - start, end - start, recipe.warm_up)
