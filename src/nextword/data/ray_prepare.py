"""One text prepared by the processes of a Ray cluster: each begins with another part, and all are given the same."""

from pathlib import Path
from typing import Any

from nextword.common.console import Console
from nextword.common.errors import MissingDependencyError, NextwordError
from nextword.data.corpus import Corpus
from nextword.data.prepare import MAX_SHARDS, prepare


def prepare_on_ray(corpora: list[str], out: Path, settings: dict[str, Any], console: Console) -> Corpus:
    """As `together.prepare`, in as many parts as the cluster has processors: the one that RAY_ADDRESS names, or one that is
    made on this machine. All of it sees the same files. A part that is lost is begun again, three times at most.

    Raises:
        MissingExtra: Ray is not installed.
        NextwordError: what a part ended with.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError("--engine ray", "ray") from error
    started_ray = not ray.is_initialized()
    if started_ray:
        ray.init(log_to_driver=False, logging_level="error")
    try:
        count = max(1, min(MAX_SHARDS, int(ray.cluster_resources().get("CPU", 1))))
        prepare_task = ray.remote(num_cpus=1, max_retries=3)(prepare_shard)
        tasks = [
            prepare_task.remote(corpora, str(out), f"{number}/{count}", settings) for number in range(1, count + 1)
        ]
        pending = tasks
        while pending:
            console.progress("preparing", count - len(pending), count)
            done, pending = ray.wait(pending, timeout=1.0)
            for failure in filter(None, ray.get(done)):
                error = NextwordError(failure["words"])
                error.exit_code = failure["exit_code"]
                raise error
    except RayError as error:
        raise NextwordError(f"--engine ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if started_ray:
            ray.shutdown()
    console.close()
    return prepare(corpora, out, None, **settings, log=console.info)  # which finds it there


def prepare_shard(corpora: list[str], out: str, shard: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What each process does; what went wrong, in words, since not every error can be sent."""
    try:
        prepare(corpora, Path(out), shard, **settings)
    except NextwordError as error:
        return {"words": str(error), "exit_code": error.exit_code}
    return None
