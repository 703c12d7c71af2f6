"""What `nextword evaluate` says to a person."""

from typing import Any

SHOWN = 12  # groups of a suite; of more than these the lowest and the highest


def evaluation_in_words(result: dict[str, Any]) -> str:
    """A text's figures, then a few lines for each suite."""
    lines = text_in_words(result) if "loss" in result else []
    for name, suite in result.get("suites", {}).items():
        lines += [*([""] if lines else []), *suite_in_words(name, suite)]
    return "\n".join(lines)


def text_in_words(result: dict[str, Any]) -> list[str]:
    low, high = result["interval"]["low"], result["interval"]["high"]
    lines = [
        f"loss {result['loss']:.4f} nats/token · perplexity {result['perplexity']:.2f} · "
        f"{result['bits_per_byte']:.4f} bits/byte ({low:.4f} to {high:.4f}), over {result['tokens']:,} tokens, "
        f"{result['bytes']:,} bytes; windows {result['stride']:,} tokens apart"
    ]
    if against := result.get("against"):
        lines.append(f"  {against['model']}: {against['bits_per_byte']:.4f} bits/byte; {compared_in_words(against)}")
    if noise := result.get("noise"):
        lines.append(noise_in_words(noise))
    if use := result.get("context_use"):
        lines.append(f"{'position':>10}  {'loss':>8}  {'shuffled':>8}")
        places = [2**k for k in range(20) if 2**k < len(use["true"])] + [len(use["true"])]
        for first, last in zip([0, *places], places, strict=False):  # the mean up to each power of two
            means = (sum(use[kind][first:last]) / (last - first) for kind in ("true", "shuffled"))
            lines.append(f"{last:>10,}  " + "  ".join(f"{mean:>8.4f}" for mean in means))
    return lines


def suite_in_words(name: str, suite: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {suite['metric']} {score_in_words(suite)}{items_in_words(suite)}{chance_in_words(suite)}"]
    if mixed := suite.get("scrambled"):
        seen = "the order of the words matters to it" if mixed["order_matters"] else "no difference is seen"
        lines.append(f"  with its words scrambled {score_in_words(mixed)}, {mixed['n']:,} items: {seen}")
    for other, score in suite.get("others", {}).items():
        lines.append(f"  {other} {score_in_words(score if isinstance(score, dict) else {'score': score})}")
    if suite.get("ties"):
        lines.append(f"  {suite['ties']:,} ties, which count half (or their share)")
    for key, whose in (("people", "what people wrote there"), ("beside_people", "as much of the model's")):
        if part := suite.get(key):
            others = " · ".join(f"{other} {score:.3f}" for other, score in part["others"].items())
            lines.append(f"  {whose}: {score_in_words(part)} · {others}, {part['n']:,} texts")
    if judge := suite.get("judge"):
        lines.append(f"  under {judge['model']}: {score_in_words(judge | {'score': judge['value']})} bits/byte")
    if noise := suite.get("noise"):
        lines.append(noise_in_words(noise))
    if against := suite.get("against"):
        lines.append(f"  {against['model']}: {score_in_words(against)}; {compared_in_words(against)}")
    return lines + groups_in_words(suite.get("groups", {}))


def score_in_words(score: dict[str, Any]) -> str:
    digits = 3 if abs(score["score"]) <= 1.5 else 2
    interval = f" ({score['low']:.{digits}f} to {score['high']:.{digits}f})" if score.get("low") is not None else ""
    return f"{score['score']:.{digits}f}{interval}"


def items_in_words(suite: dict[str, Any]) -> str:
    whole = suite.get("of", suite["n"])
    return f", {suite['n']:,} items" + (f" of {whole:,}" if whole > suite["n"] else "")


def chance_in_words(suite: dict[str, Any]) -> str:
    """On which side of chance a score is. Of stereotypes, of which guessing prefers half, which way it leans."""
    if suite.get("chance") is None:
        return ""
    if suite["metric"] == "stereotyped":
        leaning = "towards" if suite["above_chance"] else "against" if suite["below_chance"] else ""
        return "; even-handed 0.5: " + (f"it leans {leaning} the stereotypes" if leaning else "no leaning is seen")
    where = "above" if suite["above_chance"] else "below" if suite.get("below_chance") else "not above"
    return f"; chance {suite['chance']:.3g}: {where} chance"


def noise_in_words(noise: dict[str, Any]) -> str:
    return f"  the seed alone makes differences of up to {noise['floor']:.4f} ({noise['models']} runs)"


def compared_in_words(against: dict[str, Any]) -> str:
    """Whether two models differ; which is ahead only where they do."""
    apart = against["difference"]
    digits = 4 if abs(apart["high"]) < 1.5 else 2
    said = f"difference {apart['value']:+.{digits}f} ({apart['low']:+.{digits}f} to {apart['high']:+.{digits}f})"
    said += f", p = {against['p']:.2g}" if "p" in against else ""
    if not against["real"]:
        return f"{said}: the two are not told apart"
    ahead = "this model is ahead" if against["ahead"] == "this" else "the other model is ahead"
    return f"{said}: {ahead}" + ("" if against.get("beyond_noise", True) else ", by no more than a seed makes")


def groups_in_words(groups: dict[str, dict[str, Any]]) -> list[str]:
    """A line a group, the lowest first, and on which side of chance it is, if its interval is on one."""
    order = sorted(groups, key=lambda name: groups[name]["score"])
    width = max(map(len, order), default=0)
    lines = []
    for name in order:
        group = groups[name]
        side = " above" if group.get("above_chance") else " below" if group.get("below_chance") else ""
        lines.append(f"    {name:<{width}}  {score_in_words(group)}, {group['n']:,} items{side}")
    if len(lines) > SHOWN:
        lines[SHOWN // 2 : -SHOWN // 2] = [f"    … {len(lines) - SHOWN} more …"]
    return lines
