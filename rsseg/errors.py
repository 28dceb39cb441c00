"""Errors that the user can fix: one sentence that says what is wrong and where, one that says what to do.

The command line prints the message without a traceback and exits with the class's code. Any other exception is a bug.
"""

from typing import ClassVar


class RssegError(Exception):
    """Base of all expected errors."""

    exit_code: ClassVar[int] = 1


class UsageError(RssegError):
    """A command or a function was called with arguments that do not fit together."""

    exit_code = 2


class RecipeError(RssegError):
    """A recipe is invalid."""

    exit_code = 3


class DataError(RssegError):
    """Images, masks or an index are missing, unreadable or contradict each other."""

    exit_code = 4


class WeightsError(RssegError):
    """Weights or a model are missing, foreign, damaged, or may not be fetched."""

    exit_code = 5


class MachineError(RssegError):
    """Too little memory or disk space, or no such device."""

    exit_code = 6


class PartialFailure(RssegError):  # noqa: N818 - a batch that ended with some of its scenes failed
    """Some items of a batch failed; the others are done."""

    exit_code = 7


class CheckFailed(RssegError):  # noqa: N818 - the result of a check, not a fault
    """A check that the user asked for failed."""

    exit_code = 8


class Interrupted(RssegError):  # noqa: N818 - the user or the scheduler stopped the run
    """Stopped by a signal after saving."""

    exit_code = 130
