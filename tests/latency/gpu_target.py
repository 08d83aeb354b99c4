"""A target that says it runs on a GPU, for reports: opened in a worker's process."""

from __future__ import annotations

from fdconv_deploy.latency.targets import Details, OpenTarget, Target
from fdconv_deploy.runtime.backends.base import Phases


def plain(target: Target) -> OpenTarget:
    """The baseline's."""
    work = opened(target)
    work.details["engine"] = "/bundle/engines/plain engine.plan"
    return work


def opened(target: Target) -> OpenTarget:
    """Does nothing; its phases are made up."""
    manner = "TF32 off; one CUDA graph a run, on a stream of its own"
    details = Details(backend="tensorrt", manner=manner, engine="/bundle/engines/an engine.plan")
    phases = Phases(h2d=0.001, compute=0.005, d2h=0.002, no_copies=0.0055)
    return OpenTarget(lambda: None, "cuda", details, phases=lambda: phases)
