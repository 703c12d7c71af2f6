"""What a run has cost: operations, time, memory, energy, and by stated rates its money and its carbon dioxide."""

import math
from pathlib import Path
from typing import Any

from nextword.audit.findings import Finding
from nextword.common import fs
from nextword.common.errors import NextwordError, UsageError
from nextword.common.run_dir import RunFolder
from nextword.model.config import ModelConfig
from nextword.planning.size_selection import flops_of


def audit_cost(run: Path, *, price: float | None = None, intensity: float | None = None) -> list[Finding]:
    """What a finished run has cost. What is not in its files, those of an older run, is left out.

    Args:
        price: of a kilowatt-hour, in whatever money; without it no money is told.
        intensity: grams of carbon dioxide (equivalents) of a kilowatt-hour; without it none is told.

    Raises:
        UsageError: a rate below zero or none at all.
        NextwordError: this is no run folder, or the run is not finished.
    """
    for name, rate in (("price", price), ("intensity", intensity)):
        if rate is not None and not (math.isfinite(rate) and rate >= 0):
            raise UsageError(f"the {name} of a kilowatt-hour must be a number of at least 0, not {rate}")
    folder = RunFolder(Path(run))
    if not folder.begun:
        raise NextwordError(f"{run}: no run folder (no run.json in it), so what it has cost is not known")
    if not folder.finished:
        raise NextwordError(f"{run}: this run is not finished; go on with it by the command that began it and --resume")
    facts, result = folder.facts(), _mapping(fs.read_json(folder.result))
    tokens, seconds = _number(result.get("tokens")), _number(result.get("seconds"))
    found: list[Finding] = []
    if tokens is not None and isinstance(facts.get("model"), dict):
        flops = tokens * flops_of(ModelConfig.from_dict(facts["model"]))
        found.append(
            _cost("operations of training (estimated)", flops, "FLOPs",
                  f"of {tokens:,.0f} tokens, six for each weight and token and those of attention; looks at held-out text "
                  "are not among them")
        )  # fmt: skip
    if seconds is not None:
        found.append(
            _cost("time of the run", seconds, "seconds", "wall time of all its processes, preparation included")
        )
    if memory := _number(result.get("memory_bytes")):
        found.append(_cost("memory at most", memory, "bytes", "of the process, or of the GPU where it used one"))
    return found + _energy(_mapping(result.get("energy")), price, intensity)


def _energy(energy: dict[str, Any], price: float | None, intensity: float | None) -> list[Finding]:
    """Energy, and what follows from it by rates that a person states."""
    hours = _number(energy.get("watt_hours"))
    if hours is None:
        return []
    kilowatt_hours = hours / 1000
    measured = energy.get("measured") is True
    mark = "" if measured else " (estimated)"
    how = "by the machine's own counters" if measured else "from its time and the usual power of such processors"
    found = [_cost(f"electric energy{mark}", kilowatt_hours, "kWh", f"of the processor or the GPU, {how}")]
    if price is not None:
        found.append(_cost(f"money{mark}", price * kilowatt_hours, "", f"at {price:g} for a kilowatt-hour"))
    if intensity is not None:
        grams = intensity * kilowatt_hours
        found.append(_cost(f"carbon dioxide{mark}", grams, "g", f"at {intensity:g} g for a kilowatt-hour"))
    return found


def _cost(name: str, value: float, unit: str, note: str) -> Finding:
    return Finding("cost", name, value, unit=unit, note=note)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 else None
