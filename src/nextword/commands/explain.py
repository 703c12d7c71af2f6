"""The verb that explains a text by a model's own numbers, and its short answer in words."""

from pathlib import Path
from typing import Any

from nextword.commands.options import CommonOptions, print_result


def explain(
    model: Path,
    texts: list[str],
    /,
    *,
    out: Path = Path("explanation.html"),
    word: str | None = None,
    label: str | None = None,
    common: CommonOptions = CommonOptions(),
) -> None:
    """Show what happens inside a model as it reads a text: which words surprise it, where each head looks, what each layer
    would already say, and which words the prediction leans on.

    Parameters
    ----------
    model
        A run folder or a model directory, ours or stock.
    texts
        A text to go on with, in quotation marks; of a fine-tuned model the texts of one example, as for nextword predict.
    out
        The page, which needs nothing outside of itself.
    word
        Explain the probability of this next word instead of the likeliest one.
    label
        Explain this label (or choice, from 0) instead of the one that the model gives.
    """
    from nextword.commands import api

    explanation = api.explain(model, texts, word=word, label=label, out=out, device=common.device)
    print_result(explanation, common, lambda: format_explanation(explanation))


def format_explanation(explanation: dict[str, Any]) -> str:
    """The answer, what was surprising, what the answer leans on, and where the page is."""
    attribution, tokens = explanation["leaning"], explanation["tokens"]
    lines = [f"note: {note}" for note in explanation["notes"]]
    if explanation["answer"] is not None:
        lines.append(f"answer: {format_answer(explanation['answer'])}")
    elif "next" in tokens[-1]:
        lines.append(
            "next: "
            + ", ".join(f"{quote_token(one)} {100 * one['probability']:.1f} %" for one in tokens[-1]["next"][:5])
        )
    predicted = [one for one in tokens if one.get("surprisal") is not None]
    if predicted:
        most_surprising = sorted(predicted, key=lambda one: -one["surprisal"])[:3]
        mean = sum(one["surprisal"] for one in predicted) / len(predicted)
        token_list = ", ".join(f"{quote_token(one)} {one['surprisal']:.1f}" for one in most_surprising)
        lines.append(f"surprising: {token_list} bits; {mean:.1f} on average")
    parts = sorted(zip(attribution["parts"], tokens, strict=True), key=lambda pair: -abs(pair[0]))[:5]
    token_list = ", ".join(f"{quote_token(one)} {part:+.2f}" for part, one in parts)
    lines.append(f"{printable(attribution['target'])} leans on: {token_list} {attribution['unit']}".replace("-", "−"))
    exact = f"the parts add up within {100 * attribution['relative_error']:.2g} %, {attribution['steps']} steps"
    return "\n".join([*lines, f"  of {attribution['difference']:+.2f}; {exact}", f"page: {explanation['page']}"])


def format_answer(answer: dict[str, Any]) -> str:
    if "score" in answer:
        return f"{answer['score']:.3f}"
    probabilities = answer["probabilities"]
    if "labels" in answer:
        return ", ".join(f"{label} {100 * probabilities[label]:.1f} %" for label in answer["labels"]) or "no label"
    answer_text = answer.get("text", answer["label"])
    return f"{answer_text} {100 * probabilities[answer['label']]:.1f} %"


def quote_token(token: dict[str, Any]) -> str:
    return f"“{printable(token['text'])}”"


def printable(text: str) -> str:
    """A token in a line of the terminal: what would move its cursor is seen and does nothing."""
    plain = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "\ufffd" for c in plain.strip(" ") or "␣" * len(plain))
