"""Errors a user can act on.

Each message says what was expected, what was found and what to do. The command
line prints the message alone, without a traceback.
"""


class FDConvError(Exception):
    """Base of every error this project raises for a mistake outside its own code.

    ``command_line``: the same in the command line's words, where they are others.
    """

    command_line: str | None = None


class UsageError(FDConvError):
    """Options that are none, or do not fit together or to what was given."""


class UnsupportedLayerError(FDConvError, ValueError):
    """An FDConv layer's arguments describe something that cannot be built."""


class CheckpointError(FDConvError):
    """A checkpoint cannot be read, or is not of a network known here."""


class BundleError(FDConvError):
    """A bundle is damaged, incomplete, unsafe or of a newer format."""


class ImageError(FDConvError, ValueError):
    """An image cannot be decoded or is outside the accepted limits."""


class ExportError(FDConvError):
    """A network cannot be exported, or its export is not equal to it."""


class BackendError(FDConvError):
    """An inference backend is not installed or cannot run this bundle.

    Args:
        cause: what was found and expected.
        advice: what to do.

    Attributes:
        cause: without the advice, for a list of what can be used.
    """

    def __init__(self, cause: str, advice: str = "") -> None:
        super().__init__(f"{cause} {advice}".rstrip())
        self.cause = cause


def in_the_way(kind: type[FDConvError], what: str) -> FDConvError:
    """The error that a result's place is taken.

    Args:
        what: a sentence that names it. How to replace it is added: by an argument in Python, by an
            option on the command line.
    """
    error = kind(f"{what} Give another name, or replace it with overwrite=True.")
    error.command_line = f"{what} Give another name, or replace it with --overwrite."
    return error
