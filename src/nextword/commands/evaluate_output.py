"""What `nextword evaluate` says to a person."""

from typing import Any

MAX_GROUPS_SHOWN = 12  # groups of a suite; of more than these the lowest and the highest


def format_evaluation(result: dict[str, Any]) -> str:
    """A text's figures, then a few lines for each suite."""
    lines = format_perplexity(result) if "loss" in result else []
    for name, suite in result.get("suites", {}).items():
        lines += [*([""] if lines else []), *format_benchmark(name, suite)]
    return "\n".join(lines)


def format_perplexity(result: dict[str, Any]) -> list[str]:
    low, high = result["interval"]["low"], result["interval"]["high"]
    lines = [
        f"loss {result['loss']:.4f} nats/token · perplexity {result['perplexity']:.2f} · "
        f"{result['bits_per_byte']:.4f} bits/byte ({low:.4f} to {high:.4f}), over {result['tokens']:,} tokens, "
        f"{result['bytes']:,} bytes; windows {result['stride']:,} tokens apart"
    ]
    if comparison := result.get("against"):
        lines.append(
            f"  {comparison['model']}: {comparison['bits_per_byte']:.4f} bits/byte; {format_model_comparison(comparison)}"
        )
    if seed_variance := result.get("noise"):
        lines.append(format_seed_variance(seed_variance))
    if context_use := result.get("context_use"):
        lines.append(f"{'position':>10}  {'loss':>8}  {'shuffled':>8}")
        position_bounds = [2**k for k in range(20) if 2**k < len(context_use["true"])] + [len(context_use["true"])]
        for first, last in zip(
            [0, *position_bounds], position_bounds, strict=False
        ):  # the mean up to each power of two
            means = (sum(context_use[kind][first:last]) / (last - first) for kind in ("true", "shuffled"))
            lines.append(f"{last:>10,}  " + "  ".join(f"{mean:>8.4f}" for mean in means))
    return lines


def format_benchmark(name: str, benchmark: dict[str, Any]) -> list[str]:
    lines = [
        f"{name}: {benchmark['metric']} {format_score(benchmark)}{format_item_count(benchmark)}{format_chance_comparison(benchmark)}"
    ]
    if shuffled := benchmark.get("scrambled"):
        seen = "the order of the words matters to it" if shuffled["order_matters"] else "no difference is seen"
        lines.append(f"  with its words scrambled {format_score(shuffled)}, {shuffled['n']:,} items: {seen}")
    for other, score in benchmark.get("others", {}).items():
        lines.append(f"  {other} {format_score(score if isinstance(score, dict) else {'score': score})}")
    if benchmark.get("ties"):
        lines.append(f"  {benchmark['ties']:,} ties, which count half (or their share)")
    for key, whose in (("people", "what people wrote there"), ("beside_people", "as much of the model's")):
        if part := benchmark.get(key):
            others = " · ".join(f"{other} {score:.3f}" for other, score in part["others"].items())
            lines.append(f"  {whose}: {format_score(part)} · {others}, {part['n']:,} texts")
    if judge := benchmark.get("judge"):
        lines.append(f"  under {judge['model']}: {format_score(judge | {'score': judge['value']})} bits/byte")
    if seed_variance := benchmark.get("noise"):
        lines.append(format_seed_variance(seed_variance))
    if comparison := benchmark.get("against"):
        lines.append(f"  {comparison['model']}: {format_score(comparison)}; {format_model_comparison(comparison)}")
    return lines + format_groups(benchmark.get("groups", {}))


def format_score(score: dict[str, Any]) -> str:
    digits = 3 if abs(score["score"]) <= 1.5 else 2
    interval = f" ({score['low']:.{digits}f} to {score['high']:.{digits}f})" if score.get("low") is not None else ""
    return f"{score['score']:.{digits}f}{interval}"


def format_item_count(benchmark: dict[str, Any]) -> str:
    total = benchmark.get("of", benchmark["n"])
    return f", {benchmark['n']:,} items" + (f" of {total:,}" if total > benchmark["n"] else "")


def format_chance_comparison(benchmark: dict[str, Any]) -> str:
    """On which side of chance a score is. Of stereotypes, of which guessing prefers half, which way it leans."""
    if benchmark.get("chance") is None:
        return ""
    if benchmark["metric"] == "stereotyped":
        leaning = "towards" if benchmark["above_chance"] else "against" if benchmark["below_chance"] else ""
        return "; even-handed 0.5: " + (f"it leans {leaning} the stereotypes" if leaning else "no leaning is seen")
    where = "above" if benchmark["above_chance"] else "below" if benchmark.get("below_chance") else "not above"
    return f"; chance {benchmark['chance']:.3g}: {where} chance"


def format_seed_variance(seed_variance: dict[str, Any]) -> str:
    return f"  the seed alone makes differences of up to {seed_variance['floor']:.4f} ({seed_variance['models']} runs)"


def format_model_comparison(comparison: dict[str, Any]) -> str:
    """Whether two models differ; which is ahead only where they do."""
    difference = comparison["difference"]
    digits = 4 if abs(difference["high"]) < 1.5 else 2
    summary = f"difference {difference['value']:+.{digits}f} ({difference['low']:+.{digits}f} to {difference['high']:+.{digits}f})"
    summary += f", p = {comparison['p']:.2g}" if "p" in comparison else ""
    if not comparison["real"]:
        return f"{summary}: the two are not told apart"
    ahead = "this model is ahead" if comparison["ahead"] == "this" else "the other model is ahead"
    return f"{summary}: {ahead}" + ("" if comparison.get("beyond_noise", True) else ", by no more than a seed makes")


def format_groups(groups: dict[str, dict[str, Any]]) -> list[str]:
    """A line a group, the lowest first, and on which side of chance it is, if its interval is on one."""
    order = sorted(groups, key=lambda name: groups[name]["score"])
    width = max(map(len, order), default=0)
    lines = []
    for name in order:
        group = groups[name]
        side = " above" if group.get("above_chance") else " below" if group.get("below_chance") else ""
        lines.append(f"    {name:<{width}}  {format_score(group)}, {group['n']:,} items{side}")
    if len(lines) > MAX_GROUPS_SHOWN:
        lines[MAX_GROUPS_SHOWN // 2 : -MAX_GROUPS_SHOWN // 2] = [f"    … {len(lines) - MAX_GROUPS_SHOWN} more …"]
    return lines
