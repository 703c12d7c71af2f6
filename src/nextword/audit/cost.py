"""What a run cost: compute, time, memory and energy, and the price and carbon emissions of that energy."""

from nextword.audit.findings import Finding
from nextword.common import fs
from nextword.common.results import is_number
from nextword.common.run_dir import RunDir
from nextword.model.config import ModelConfig


def audit_cost(run: RunDir, price: float | None = None, carbon_intensity: float | None = None) -> list[Finding]:
    """The compute, time, memory and energy of a complete run. Values that its files do not contain, as in older runs, are left
    out.

    Args:
        run: the run.
        price: of a kilowatt-hour, in any currency; without it the energy cost is left out.
        carbon_intensity: grams of CO2 equivalents per kilowatt-hour; without it emissions are left out.
    """
    values, model = fs.read_sealed_json(run.result_path), run.metadata().get("model")
    energy = values.get("energy")
    values |= energy if fs.is_json_object(energy) else {}
    numbers = {name: float(value) for name, value in values.items() if is_number(value)}
    rows: list[tuple[str, float, str, str]] = []
    if "tokens" in numbers and fs.is_json_object(model):
        flops = numbers["tokens"] * ModelConfig.from_dict(model).flops_per_token
        note = (
            f"for {numbers['tokens']:,.0f} tokens: six per weight and token, and attention; validation is not included"
        )
        rows.append(("training compute (estimated)", flops, "FLOPs", note))
    if "seconds" in numbers:
        rows.append(("run time", numbers["seconds"], "seconds", "wall time of all processes, including preparation"))
    if numbers.get("memory_bytes"):
        rows.append(("peak memory", numbers["memory_bytes"], "bytes", "of the process, or of the GPU if it used one"))
    if "watt_hours" in numbers:
        suffix, source = " (estimated)", "from the run time and the typical power of such hardware"
        if values.get("measured") is True:
            suffix, source = "", "from hardware counters"
        kilowatt_hours = numbers["watt_hours"] / 1000
        rows.append((f"energy{suffix}", kilowatt_hours, "kWh", f"of the CPU or GPU, {source}"))
        if price is not None:
            rows.append((f"energy cost{suffix}", price * kilowatt_hours, "", f"at {price:g} per kilowatt-hour"))
        if carbon_intensity is not None:
            note = f"CO2 equivalents at a carbon intensity of {carbon_intensity:g} g/kWh"
            rows.append((f"carbon emissions{suffix}", carbon_intensity * kilowatt_hours, "g", note))
    return [Finding("cost", name, value, unit=unit, note=note) for name, value, unit, note in rows]
