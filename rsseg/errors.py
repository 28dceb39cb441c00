"""Errors that a user can fix: one sentence says what is wrong and where, one what to do.

The command line prints the message without a traceback and exits with the class's code. Any other exception is a bug.
"""

import errno
import re
from typing import ClassVar


class RssegError(Exception):
    """Base of all expected errors."""

    exit_code: ClassVar[int] = 1


class UsageError(RssegError):
    """Arguments of a command or function are invalid or contradict each other."""

    exit_code = 2


class RecipeError(RssegError):
    """A recipe is invalid."""

    exit_code = 3


class DataError(RssegError):
    """Images, masks or an index are missing, unreadable or contradict each other."""

    exit_code = 4


class WeightsError(RssegError):
    """Weights or a model are missing, foreign, damaged, or must not be downloaded."""

    exit_code = 5


class MachineError(RssegError):
    """Memory, disk or device are insufficient."""

    exit_code = 6


class PartialFailure(RssegError):  # noqa: N818 - not an error of the program
    """Some items of a batch failed; the others are finished."""

    exit_code = 7


class CheckFailed(RssegError):  # noqa: N818 - the result of a check
    """A requested check is not met."""

    exit_code = 8


class RssegWarning(UserWarning):
    """A condition that does not stop the command but that the user should know."""


class Interrupted(RssegError):  # noqa: N818 - not an error of the program
    """Stopped by a signal after saving."""

    exit_code = 130


_LIMITS = re.compile(
    r"out of memory|can't allocate memory|_ALLOC_FAILED|[Ww]orker.* (killed by signal|exited unexpectedly)"
    r"|out of shared memory|[Tt]oo many open files|No space left on device"
)
_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer")


def machine_error(error: BaseException) -> MachineError | None:
    """Describe an exception of torch or the system that is about the machine; None for any other."""
    if isinstance(error, RssegError):
        return None
    limits = (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
    lines = str(error).strip().splitlines() or ["out of memory"]
    reason = next((line for line in lines if _LIMITS.search(line)), lines[0]).rstrip(".")
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in limits):
        found = True
    else:
        found = isinstance(error, RuntimeError | OSError) and _LIMITS.search(str(error)) is not None
    if found:
        return MachineError(
            f"not enough memory, disk space or open files: {reason}. Choose a smaller batch, crop, tile or network, "
            "fewer loader workers, or free some space."
        )
    if isinstance(error, RuntimeError) and _LOST.search(str(error)):
        return MachineError(f"lost the connection to another process: {reason}. See the output of that process.")
    return None
