"""``nextword explain``: what a model computes as it reads a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextword.commands.command import Context, command
from nextword.commands.shared import check_is_text, check_output_file, optional, read_texts
from nextword.common.command_result import Result
from nextword.common.errors import UsageError
from nextword.common.format import show_whitespace
from nextword.common.options import DeviceOption, ModelArgument, argument, as_strings, option, options


@options
class ExplainConfig(ModelArgument, DeviceOption):
    """Visualize surprisal, attention and attributions on a text.

    Writes an interactive page, which needs no other file, with the predictions of each layer (logit lens) as well.

    Attributes:
        texts: A text to continue; for a fine-tuned model the texts of one example, as for nextword predict. One text that could
            be the name of a file is not taken: use --text.
        text: A text, whatever it looks like. May be given more than once, instead of the argument. Default: none.
        word: Next word whose probability is explained. Default: the most likely one.
        label: Label (or choice, counted from 0) whose logit is explained. Default: the predicted one.
        out: Path of the page. Default: explanation.html, and no page in Python.
    """

    texts: tuple[str, ...] = argument(default=(), converter=as_strings)
    text: tuple[str, ...] = option(default=(), converter=as_strings)
    word: str | None = None
    label: str | None = None
    out: Path | None = option(default=None, converter=optional(Path))


@dataclass(frozen=True)
class ExplainResult(Result):
    """The computation of a model on a text.

    Attributes:
        model: Path of the model.
        about: Sizes and settings of the model.
        task: Task of a fine-tuned model.
        texts: The texts.
        notes: Remarks about the input.
        answer: Prediction of a fine-tuned model.
        tokens: For each token its text, probability, rank, surprisal in bits, and the most likely next tokens (next).
        attention: Attention weights by layer, head and position.
        heads: For each layer and head, the weight on the previous token, the first token and the token itself.
        layers: Predictions of each layer at each position (logit lens).
        leaning: Attribution of the explained output to each token (integrated gradients).
        page: Path of the page.
    """

    model: str
    about: dict[str, Any]
    task: str | None
    texts: list[str]
    notes: list[str]
    answer: dict[str, Any] | None
    tokens: list[dict[str, Any]]
    attention: list[Any]
    heads: list[Any]
    layers: list[Any]
    leaning: dict[str, Any]
    page: str | None = None

    def __str__(self) -> str:
        lines = [f"note: {note}" for note in self.notes]
        if self.answer is not None:
            lines.append(f"prediction: {format_prediction(self.answer)}")
        elif "next" in self.tokens[-1]:
            likely = self.tokens[-1]["next"][:5]
            lines.append("next token: " + ", ".join(f"{quote(t)} {100 * t['probability']:.1f} %" for t in likely))
        if predicted := [token for token in self.tokens if token.get("surprisal") is not None]:
            highest = sorted(predicted, key=lambda token: -token["surprisal"])[:3]
            mean = sum(token["surprisal"] for token in predicted) / len(predicted)
            tokens = ", ".join(f"{quote(token)} {token['surprisal']:.1f}" for token in highest)
            lines.append(f"highest surprisal: {tokens} bits; mean {mean:.1f}")
        attributions = self.leaning
        pairs = sorted(zip(attributions["parts"], self.tokens, strict=True), key=lambda pair: -abs(pair[0]))[:5]
        tokens = ", ".join(f"{quote(token)} {part:+.2f}" for part, token in pairs).replace("-", "−")
        lines.append(f"attributions for {show_whitespace(attributions['target'])}: {tokens} {attributions['unit']}")
        lines.append(
            f"  sum {attributions['difference']:+.2f}, within {100 * attributions['relative_error']:.2g} % of the exact "
            f"difference after {attributions['steps']} steps"
        )
        return "\n".join(lines if self.page is None else [*lines, f"page: {self.page}"])


def format_prediction(prediction: dict[str, Any]) -> str:
    """The predicted score, labels, label or text, with probabilities."""
    if "score" in prediction:
        return f"{prediction['score']:.3f}"
    probabilities = prediction["probabilities"]
    if "labels" in prediction:
        return ", ".join(f"{label} {100 * probabilities[label]:.1f} %" for label in prediction["labels"]) or "no label"
    text = prediction.get("text", prediction["label"])
    return f"{text} {100 * probabilities[prediction['label']]:.1f} %"


def quote(token: dict[str, Any]) -> str:
    """The text of a token in quotation marks."""
    return f"“{show_whitespace(token['text'])}”"


@command(ExplainConfig, example="nextword explain runs/mine 'The capital of France is'")
def explain(config: ExplainConfig, context: Context) -> ExplainResult:
    """Explain a model on a text, and write the page."""
    from nextword.interpretability.explain import explain as explain_text
    from nextword.pipeline.language_model import load
    from nextword.reporting.explain_page import write_explanation_page

    if bool(config.texts) == bool(config.text):
        raise UsageError("give the texts either as arguments or by --text")
    if context.output is not None and len(config.texts) == 1:
        check_is_text(config.texts[0])
    texts = read_texts(config.texts or config.text)
    out = config.out or (Path("explanation.html") if context.output else None)
    if out is not None:
        check_output_file(out, config.model)
    explanation = explain_text(load(config.model, config.device), texts, word=config.word, label=config.label)
    return ExplainResult(**explanation, page=out and str(write_explanation_page(explanation, out)))
