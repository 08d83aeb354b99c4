"""Which image runs when, with which others, on which worker."""

from .queue import Batch, BatchQueue, Item
from .scheduler import DeadlineError, Outcome, Scheduler, WorkerDiedError

__all__ = [
    "Batch",
    "BatchQueue",
    "DeadlineError",
    "Item",
    "Outcome",
    "Scheduler",
    "WorkerDiedError",
]
