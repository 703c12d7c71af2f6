"""Checkpoints: the step, the weights and the optimizer's state, sealed under SHA-256, no pickle.

A checkpoint is written aside, sealed, moved into place, and only then named by `latest`; only then is an older one removed,
and two are kept. So a crash at any moment leaves a whole one.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextword.errors import CorruptFile
from nextword.files import check_seal, seal, write_durably, writing

KEPT = 2


def save(
    run: Path, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], facts: dict[str, Any]
) -> Path:
    """Write the state after `step` steps; return its directory once it is durable and named by `latest`."""
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}.partial"
    with writing(final):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in weights.items()}, aside / "weights.safetensors"
        )
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in optimizer.items()}, aside / "optimizer.safetensors"
        )
    seal(aside, {"step": step, "state": facts})
    with writing(final):
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved by a process that was then killed
        aside.rename(final)
    write_durably(folder / "latest", final.name + "\n")
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)
    return final


def checkpoints(run: Path) -> list[Path]:
    """Every finished checkpoint of a run, the oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def newest_whole(run: Path, say: Any = None, strict: bool = False) -> Path | None:
    """The newest checkpoint that is whole, None where there is none at all.

    Raises:
        CorruptFile: there are checkpoints, and each of them is damaged; every file is named. With `strict` the newest alone.
    """
    found = checkpoints(run)[::-1]
    damage = []
    for path in found:
        try:
            check_seal(path)
            return path
        except CorruptFile as error:
            if strict:
                raise
            damage.append(str(error))
            if say is not None:
                say(f"{path.name} is damaged and passed over:\n{error}")
    if damage:
        raise CorruptFile("every checkpoint is damaged:\n" + "\n".join(damage))
    return None


def load(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, optimizer state and facts of a checkpoint that was checked."""
    facts = check_seal(path)
    weights = load_file(path / "weights.safetensors", device=str(device))
    return weights, load_file(path / "optimizer.safetensors", device=str(device)), facts
