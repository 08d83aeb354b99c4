"""A target that says it runs on a GPU, for reports: opened in a worker's process."""

from __future__ import annotations

from fdconv_deploy.latency.networks import OpenTarget, Target
from fdconv_deploy.runtime.backends.base import Phases


def plain(target: Target) -> OpenTarget:
    """The baseline's."""
    return opened(target, engine="plain")


def opened(target: Target, engine: str = "an") -> OpenTarget:
    """Does nothing; its phases are made up."""
    manner = "TF32 off; one CUDA graph a run, on a stream of its own"
    file = f"/bundle/engines/{engine} engine.plan"
    found = target.opened("cuda", backend="tensorrt", manner=manner, engine=file)
    phases = Phases(h2d=0.001, compute=0.005, d2h=0.002, no_copies=0.0055)
    return OpenTarget(lambda: None, found, phases=lambda: phases)
