"""Which image runs when, with which others, on which worker."""

from fdconv_deploy.serve.batching.scheduler import (
    DeadlineError,
    Outcome,
    Scheduler,
    WorkerDiedError,
)

__all__ = ["DeadlineError", "Outcome", "Scheduler", "WorkerDiedError"]
