"""Whether a checkpoint's attentions amplify rounding, by their weights alone (docs/stability.md).

Each attention normalises one pooled value per image and channel by the training's statistics,
squares it (StarReLU) and passes it to its gates. ``running_mean / sqrt(running_var)`` is how many
standard deviations lie between the mean pooled value and that of a frame without features, or with
features twice as strong. Put through the square and the gates' weights, this gives the `swing` of
the gates' logits, free of the scale of features.
"""

from __future__ import annotations

from statistics import median

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fdconv_deploy.checkpoints.state_dict import Shapes, dynamic_names

# Half the width of a sigmoid: a gate at rest is at 1/2, one this far from it at 0.993.
SATURATED = 5.0
# The share of layers with a larger swing that makes a network amplify: with 26 of 30 the packaged
# network was unstable, with 7 to 10 it was on some frames, with 1 to 4 on none.
AMPLIFYING = 0.2

# BatchNorm's own constant, as the published attention has it.
_EPSILON = 1e-5
_GATES = ("channel_fc", "filter_fc", "spatial_fc", "kernel_fc")


class AttentionStability(BaseModel):
    """How strongly the attentions answer to frames unlike the training's.

    Attributes:
        layers: FDConv layers whose attention normalises by running statistics.
        saturating: those whose gates' logits move by more than `SATURATED` when the input's
            mean doubles or vanishes.
        median_swing: the median layer's such move.
        largest_swing: the largest one.
        largest_layer: its layer's name.
    """

    model_config = ConfigDict(frozen=True)

    layers: int
    saturating: int
    median_swing: float
    largest_swing: float
    largest_layer: str

    @property
    def amplifies(self) -> bool:
        """Whether enough layers saturate for a network to amplify rounding."""
        return self.saturating > AMPLIFYING * self.layers

    @property
    def advice(self) -> str:
        """What it means and what to do, in a few sentences."""
        return (
            f"The attention amplifies: in {self.saturating} of {self.layers} FDConv layers a frame "
            f"whose features are absent or twice as strong moves the gates' logits by more than "
            f"{SATURATED:g} ({self.median_swing:.3g} in the median layer, "
            f"{self.largest_swing:.3g} in {self.largest_layer}). Expect float32 rounding to change "
            "answers on blank, black, letterboxed or unfamiliar frames and at sizes other than "
            "trained, in PyTorch as in the exported network. `python -m benchmarks.stability` "
            "measures it; docs/stability.md says how to train against it."
        )


def attention_stability(state: Shapes) -> AttentionStability | None:
    """How strongly a network's attentions answer to unfamiliar frames, from its tensors by name.

    Returns:
        None where no FDConv layer's attention has running statistics, or where tensors hold
        no data, are missing or do not fit together.
    """
    swings: dict[str, float] = {}
    for name in dynamic_names(state):
        attention = f"{name}.KSM_Global"
        if f"{attention}.bn.running_var" not in state:
            continue
        if state[f"{attention}.bn.running_var"].is_meta:
            return None
        try:
            swings[name] = _swing(state, attention)
        except (KeyError, RuntimeError):
            return None  # tensors that are no one layer's: they are refused when it is built
    if not swings:
        return None
    largest = max(swings, key=lambda name: swings[name])
    return AttentionStability(
        layers=len(swings),
        saturating=sum(swing > SATURATED for swing in swings.values()),
        median_swing=median(swings.values()),
        largest_swing=swings[largest],
        largest_layer=largest,
    )


def _swing(state: Shapes, attention: str) -> float:
    """The largest move of a gate's logit when pooled values double, or vanish.

    All moves of the hidden layer are taken to push one way: a bound, not an estimate.
    """

    def tensor(name: str) -> Tensor:
        return state[f"{attention}.{name}"].double()

    gain = tensor("bn.weight").abs() / (tensor("bn.running_var") + _EPSILON).sqrt()
    squared = tensor("relu.scale").abs() * (gain * tensor("bn.running_mean")).square()
    gates = (f"{gate}.weight" for gate in _GATES if f"{attention}.{gate}.weight" in state)
    return max(float((tensor(gate).flatten(1).abs() @ squared).max()) for gate in gates)
