"""Errors that a user can fix: one sentence says what is wrong and where, one what to do.

The command line prints the message without a traceback and exits with the class's code. Any other exception is a bug.
"""

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


class Interrupted(RssegError):  # noqa: N818 - not an error of the program
    """Stopped by a signal after saving."""

    exit_code = 130
