"""What a run has cost: operations, time, memory, energy, and by stated rates its money and its carbon dioxide."""

import math
from pathlib import Path
from typing import Any

from nextword.audit.findings import Finding
from nextword.common import fs
from nextword.common.errors import NextwordError, UsageError
from nextword.common.run_dir import RunDir
from nextword.model.config import ModelConfig


def audit_cost(
    run: Path, *, price_per_kwh: float | None = None, carbon_intensity: float | None = None
) -> list[Finding]:
    """What a finished run has cost. What is not in its files, those of an older run, is left out.

    Args:
        price: of a kilowatt-hour, in whatever money; without it no money is told.
        intensity: grams of carbon dioxide (equivalents) of a kilowatt-hour; without it none is told.

    Raises:
        UsageError: a rate below zero or none at all.
        NextwordError: this is no run folder, or the run is not finished.
    """
    for name, rate in (("price", price_per_kwh), ("intensity", carbon_intensity)):
        if rate is not None and not (math.isfinite(rate) and rate >= 0):
            raise UsageError(f"the {name} of a kilowatt-hour must be a number of at least 0, not {rate}")
    run_dir = RunDir(Path(run))
    if not run_dir.exists:
        raise NextwordError(f"{run}: no run folder (no run.json in it), so what it has cost is not known")
    if not run_dir.is_complete:
        raise NextwordError(f"{run}: this run is not finished; go on with it by the command that began it and --resume")
    metadata, result = run_dir.metadata(), _as_dict(fs.read_json(run_dir.result_path))
    tokens, seconds = _as_nonnegative_float(result.get("tokens")), _as_nonnegative_float(result.get("seconds"))
    findings: list[Finding] = []
    if tokens is not None and isinstance(metadata.get("model"), dict):
        flops = tokens * ModelConfig.from_dict(metadata["model"]).flops_per_token
        findings.append(
            _cost_finding("operations of training (estimated)", flops, "FLOPs",
                  f"of {tokens:,.0f} tokens, six for each weight and token and those of attention; looks at held-out text "
                  "are not among them")
        )  # fmt: skip
    if seconds is not None:
        findings.append(
            _cost_finding("time of the run", seconds, "seconds", "wall time of all its processes, preparation included")
        )
    if memory := _as_nonnegative_float(result.get("memory_bytes")):
        findings.append(
            _cost_finding("memory at most", memory, "bytes", "of the process, or of the GPU where it used one")
        )
    return findings + _energy_findings(_as_dict(result.get("energy")), price_per_kwh, carbon_intensity)


def _energy_findings(
    energy: dict[str, Any], price_per_kwh: float | None, carbon_intensity: float | None
) -> list[Finding]:
    """Energy, and what follows from it by rates that a person states."""
    watt_hours = _as_nonnegative_float(energy.get("watt_hours"))
    if watt_hours is None:
        return []
    kilowatt_hours = watt_hours / 1000
    measured = energy.get("measured") is True
    estimate_suffix = "" if measured else " (estimated)"
    source = "by the machine's own counters" if measured else "from its time and the usual power of such processors"
    findings = [
        _cost_finding(
            f"electric energy{estimate_suffix}", kilowatt_hours, "kWh", f"of the processor or the GPU, {source}"
        )
    ]
    if price_per_kwh is not None:
        findings.append(
            _cost_finding(
                f"money{estimate_suffix}",
                price_per_kwh * kilowatt_hours,
                "",
                f"at {price_per_kwh:g} for a kilowatt-hour",
            )
        )
    if carbon_intensity is not None:
        grams = carbon_intensity * kilowatt_hours
        findings.append(
            _cost_finding(
                f"carbon dioxide{estimate_suffix}", grams, "g", f"at {carbon_intensity:g} g for a kilowatt-hour"
            )
        )
    return findings


def _cost_finding(name: str, value: float, unit: str, note: str) -> Finding:
    return Finding("cost", name, value, unit=unit, note=note)


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_nonnegative_float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 else None
