"""What a run cost: compute, time, memory and energy, and the price and carbon emissions of that energy."""

from typing import Any

from nextword.audit.findings import Finding
from nextword.common.fs import read_json
from nextword.common.run_dir import RunDir
from nextword.model.config import ModelConfig


def audit_cost(run: RunDir, price: float | None = None, carbon_intensity: float | None = None) -> list[Finding]:
    """The cost of a complete run. Values that its files do not contain, as in older runs, are left out.

    Args:
        price: of a kilowatt-hour, in any currency; without it the energy cost is left out.
        carbon_intensity: grams of CO2 equivalents per kilowatt-hour; without it emissions are left out.
    """
    result, model = read_json(run.result_path), run.metadata().get("model")
    values: dict[str, Any] = result if isinstance(result, dict) else {}
    energy: dict[str, Any] = values["energy"] if isinstance(values.get("energy"), dict) else {}
    tokens, seconds, memory = (_number(values.get(name)) for name in ("tokens", "seconds", "memory_bytes"))
    findings: list[Finding] = []

    def add(name: str, value: float, unit: str, note: str) -> None:
        findings.append(Finding("cost", name, value, unit=unit, note=note))

    if tokens is not None and isinstance(model, dict):
        flops = tokens * ModelConfig.from_dict(model).flops_per_token
        note = f"for {tokens:,.0f} tokens: six per weight and token, and attention; validation is not included"
        add("training compute (estimated)", flops, "FLOPs", note)
    if seconds is not None:
        add("run time", seconds, "seconds", "wall time of all processes, including preparation")
    if memory:
        add("peak memory", memory, "bytes", "of the process, or of the GPU if it used one")
    watt_hours = _number(energy.get("watt_hours"))
    if watt_hours is not None:
        measured = energy.get("measured") is True
        suffix = "" if measured else " (estimated)"
        source = "from hardware counters" if measured else "from the run time and the typical power of such hardware"
        kilowatt_hours = watt_hours / 1000
        add(f"energy{suffix}", kilowatt_hours, "kWh", f"of the CPU or GPU, {source}")
        if price is not None:
            add(f"energy cost{suffix}", price * kilowatt_hours, "", f"at {price:g} per kilowatt-hour")
        if carbon_intensity is not None:
            note = f"CO2 equivalents at a carbon intensity of {carbon_intensity:g} g/kWh"
            add(f"carbon emissions{suffix}", carbon_intensity * kilowatt_hours, "g", note)
    return findings


def _number(value: Any) -> float | None:
    """A finite number of at least 0, None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    return float(value) if is_number else None
