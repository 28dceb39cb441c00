"""Every error that is the user's to mend: one sentence of what is wrong and where, one of what to do.

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
    """A recipe does not say something that can be run."""

    exit_code = 3


class DataError(RssegError):
    """Images, masks or an index are missing, unreadable or contradict each other."""

    exit_code = 4


class WeightsError(RssegError):
    """Weights or a model are missing, foreign, damaged, or may not be fetched."""

    exit_code = 5


class MachineError(RssegError):
    """Memory, disk or device do not suffice."""

    exit_code = 6


class PartialFailure(RssegError):  # noqa: N818 - a batch that ended with some of its scenes failed
    """Some items of a batch failed; the others are done."""

    exit_code = 7


class CheckFailed(RssegError):  # noqa: N818 - the answer of a check, not a fault
    """A check that the user asked for is not met."""

    exit_code = 8


class Interrupted(RssegError):  # noqa: N818 - the user or the scheduler stopped the run
    """Stopped by a signal after saving."""

    exit_code = 130
