"""A command that is stopped unwinds as an error does, so that nothing half-written stays behind."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 128 + signal.SIGTERM
# Seconds until a stop that could not be raised, or that other code has lost, is raised again.
_AGAIN = 0.1


class _Stop(SystemExit):
    """Raised by SIGTERM."""


@contextmanager
def unwinding_when_stopped() -> Iterator[None]:
    """A ``with`` block that SIGTERM ends in a `SystemExit` of 143, wherever it is.

    Never within an import, where C code aborts the process at an exception that it does not know,
    nor while a generator tidies up; and again where a bare ``except`` or a callback of the garbage
    collector has swallowed it.
    """
    stopped = False

    def stop(_number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            if _imports(frame) or _tidies_up(sys.exc_info()[1]):
                return
        raise _Stop(STOPPED)

    before = signal.signal(signal.SIGTERM, stop)
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, stop)
    try:
        yield
    except Exception:
        if stopped:  # another's, made of it
            raise SystemExit(STOPPED) from None
        raise
    finally:
        if sys.platform != "win32":
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # first, as `stop` would set it again
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _tidies_up(error: BaseException | None) -> bool:
    """Whether an error that is handled ends a generator, is a stop, or came of one."""
    while error is not None and not isinstance(error, GeneratorExit | _Stop):
        error = error.__context__
    return error is not None
