"""What can go wrong, each with the exit code that `nextword` leaves with.

Every message says what happened, where (a path, a line), and what to do. The command line prints the message and never a
traceback; a program catches `NextwordError`.
"""


class NextwordError(Exception):
    """Anything that nextword refuses or cannot do. Exit code 1."""

    exit_code = 1


class UsageError(NextwordError):
    """The command or the call was wrong: an unknown preset, two options that exclude each other. Exit code 2."""

    exit_code = 2


class CorruptFileError(NextwordError):
    """A file is not what its manifest or its format says. Exit code 3."""

    exit_code = 3


class DiskFullError(NextwordError):
    """A write found no room; what was there before is whole. Exit code 4."""

    exit_code = 4


class TrainingDivergedError(NextwordError):
    """The loss stopped being a finite number; the weights saved before it are whole. Exit code 5."""

    exit_code = 5


class RunLockedError(NextwordError):
    """Another process works on this run folder. Exit code 6."""

    exit_code = 6


class MissingDependencyError(NextwordError):
    """An optional dependency is needed and not installed. Exit code 1."""

    def __init__(self, feature: str, extra: str):
        super().__init__(f"{feature} needs an optional package. Install it with: pip install 'nextword[{extra}]'")
