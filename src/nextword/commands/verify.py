"""``nextword verify``: the integrity of runs, models and shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.commands.command import Context, command
from nextword.commands.shared import as_paths
from nextword.common.command_result import Result
from nextword.common.options import argument, options
from nextword.common.run_dir import verify_path


@options
class VerifyConfig:
    """Check the files of a run, a model or shards for corruption.

    Compares every file with its SHA-256 checksum, and every line of a run's logs with its CRC-32.

    Attributes:
        paths: Run directories, model directories or shards.
    """

    paths: tuple[Path, ...] = argument(converter=as_paths)


@dataclass(frozen=True)
class VerifyResult(Result):
    """The verified directories.

    Attributes:
        whole: The kind of each intact directory (model, checkpoint, shards and so on) by its path.
    """

    whole: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The result as ``--json`` prints it."""
        return {"whole": self.whole}

    def __post_init__(self) -> None:
        """As a dictionary, the kinds by path."""
        self.update(self.whole)

    def __str__(self) -> str:
        return "\n".join(f"{directory}: {kind}, intact" for directory, kind in self.whole.items())


@command(VerifyConfig, example="nextword verify runs/mine")
def verify(config: VerifyConfig, context: Context) -> VerifyResult:
    """Verify each path. Raises `CorruptFileError` with the files that differ."""
    return VerifyResult({name: kind for path in config.paths for name, kind in verify_path(path).items()})
