"""Where a network's time goes and how far two of its graphs drift apart, layer by layer."""

from pydantic import BaseModel, ConfigDict

PARTS = ("convolutions", "kernel assembly", "band modulation", "attention", "rest")
# Runs of a profile before those that count.
WARM_UP = 2


class LayerTime(BaseModel):
    """A layer's milliseconds by part, of ``PARTS``; those that it has none of are left out."""

    name: str
    ms: dict[str, float]


class Divergence(BaseModel):
    """How far a layer's output a is from b: max|a − b| / max|b|, and 1 − cosine of their angle."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    name: str
    max_rel: float
    angle: float
