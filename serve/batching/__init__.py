"""Which image runs when, with which others, on which worker."""

from fdconv_deploy.serve.batching.queue import Batch, BatchQueue, Item
from fdconv_deploy.serve.batching.scheduler import (
    DeadlineError,
    Outcome,
    Scheduler,
    WorkerDiedError,
)

__all__ = [
    "Batch",
    "BatchQueue",
    "DeadlineError",
    "Item",
    "Outcome",
    "Scheduler",
    "WorkerDiedError",
]
