"""nextword as one of several processes whose communication threads get the CPU last, so that they release tensors late."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from nextword.__main__ import main
from nextword.training import distributed


def deprioritise_communication_threads() -> None:
    for name in Path("/proc/self/task").glob("*/comm"):
        if name.read_text().strip() == "pt_gloo_runloop":
            os.sched_setscheduler(int(name.parent.name), os.SCHED_IDLE, os.sched_param(0))


def lagging(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        deprioritise_communication_threads()
        return collective(*arguments, **named)

    return call


dist.broadcast = lagging(dist.broadcast)
dist.all_reduce = lagging(dist.all_reduce)
distributed.time = SimpleNamespace(
    sleep=lambda seconds: None
)  # the command line exits cleanly without the grace period
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
main()
