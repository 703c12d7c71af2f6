"""Preparation on a Ray cluster: each task is one of the processes that prepare a corpus together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, NextwordError
from nextword.data.corpus import Corpus
from nextword.data.prepare import MAX_SHARDS, prepare


@dataclass(frozen=True)
class _Failure:
    """An error in a task: not every exception can be pickled."""

    message: str
    exit_code: int


def prepare_on_ray(corpora: list[str], out: Path, settings: dict[str, Any], console: Console) -> Corpus:
    """Prepare a corpus on a Ray cluster, in a shard for each CPU.

    The cluster is the one at RAY_ADDRESS, or one that is started on this machine. All of its nodes see the same files
    at the same paths. A task that is lost is started again, at most three times.

    Args:
        corpora: paths, and names of built-in datasets.
        out: the directory of the corpus.
        settings: the other arguments of `prepare`.
        console: where messages and progress are printed.

    Raises:
        MissingDependencyError: Ray is not installed.
        NextwordError: a task has failed; with the exit code of its error.
    """
    try:
        import ray.exceptions  # pyright: ignore[reportMissingImports] -- not installed for the tests
    except ImportError as error:
        raise MissingDependencyError("--engine ray", "ray") from error
    cluster: Any = ray  # which has no types
    started_ray = not cluster.is_initialized()
    if started_ray:
        cluster.init(log_to_driver=False, logging_level="error")
    try:
        count = max(1, min(MAX_SHARDS, int(cluster.cluster_resources().get("CPU", 1))))
        task = cluster.remote(num_cpus=1, max_retries=3)(prepare_shard)
        pending = [task.remote(corpora, str(out), f"{number}/{count}", settings) for number in range(1, count + 1)]
        while pending:
            console.progress("preparing", count - len(pending), count)
            done, pending = cluster.wait(pending, timeout=1.0)
            for failure in filter(None, cluster.get(done)):
                error = NextwordError(failure.message)
                error.exit_code = failure.exit_code
                raise error
    except cluster.exceptions.RayError as error:
        raise NextwordError(f"--engine ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if started_ray:
            cluster.shutdown()
    console.close()
    return prepare(corpora, out, **settings, log=console.info)  # the corpus is complete, and is opened


def prepare_shard(corpora: list[str], out: str, shard: str, settings: dict[str, Any]) -> _Failure | None:
    """The task of each process."""
    try:
        prepare(corpora, Path(out), shard=shard, **settings)
    except NextwordError as error:
        return _Failure(str(error), error.exit_code)
    return None
