"""The exceptions of nextword, each with the exit code of the `nextword` command.

Every message says what happened, where (a path and a line), and what to do. The command line prints the message without
a traceback. A program catches `NextwordError`.
"""

import importlib
from typing import Any


class NextwordError(Exception):
    """The base class: an operation was refused or has failed. Exit code 1."""

    exit_code = 1


class UsageError(NextwordError):
    """A wrong command or call, such as an unknown preset or two options that exclude each other. Exit code 2."""

    exit_code = 2


class CorruptFileError(NextwordError):
    """A file does not match its manifest or its format. Exit code 3."""

    exit_code = 3


class DiskFullError(NextwordError):
    """A write found no free space. Files that were written before are intact. Exit code 4."""

    exit_code = 4


class TrainingDivergedError(NextwordError):
    """The loss is no longer finite. Weights that were saved before are intact. Exit code 5."""

    exit_code = 5


class RunLockedError(NextwordError):
    """Another process is using this run directory. Exit code 6."""

    exit_code = 6


class MissingDependencyError(NextwordError):
    """An optional dependency is not installed. Exit code 1.

    Args:
        feature: what needs the dependency, for example ``"texts.parquet: a .parquet file"``.
        extra: the extra of the `nextword` package that installs it, for example ``"parquet"``.
    """

    def __init__(self, feature: str, extra: str):
        super().__init__(f"{feature} needs an optional package. Install it with: pip install 'nextword[{extra}]'")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python or PyTorch says that memory could not be allocated."""
    signs = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "std::bad_alloc")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def import_optional(module: str, feature: str, extra: str) -> Any:
    """Import a module of an optional dependency. Raises `MissingDependencyError` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(feature, extra) from error
