"""A run folder's model card (`README.md`): what was measured, on what, and how the model is used."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextword.common.fs import atomic_write
from nextword.common.results import StoredResults
from nextword.reporting.card_results import evaluation_markdown, model_index, risks_markdown
from nextword.reporting.finetune_sections import (
    LM_LOSS_TASKS,
    format_score_with_ci,
    task_metadata,
    validation_loss_unit,
)
from nextword.reporting.run_data import (
    RunData,
    as_mapping,
    code_block,
    escape_markdown,
    format_duration,
    format_perplexity,
    get_nested,
    is_number,
)
from nextword.reporting.task_results import METRICS, TaskResults, base_model_name, format_forgetting
from nextword.reporting.templates import (
    ADAPTER_CODE_TEMPLATE,
    ADAPTER_TEMPLATE,
    CHAT_INPUTS_CODE,
    CLASSIFICATION_CODE_TEMPLATE,
    GENERATION_CODE_TEMPLATE,
    PRETRAINING_CARD_TEMPLATE,
    TASK_CARD_TEMPLATE,
)

DIGEST_MARKER = "written by nextword; sha-256 of what stands above:"
UNFINISHED_NOTICE = "\nThe training has not finished; these are the figures so far.\n"


def write_card(run_dir: Path) -> Path:
    """Write RUN/README.md, a Hugging Face model card that says what was measured and nothing else; its path.

    Raises:
        NextwordError: not a run folder.
        CorruptFile: a file of it is damaged.
    """
    run_data, stored_results = RunData.load(run_dir), StoredResults.load(run_dir)
    card = pretraining_card(run_data, stored_results) if run_data.task is None else task_card(run_data, stored_results)
    atomic_write(run_dir / "README.md", card + digest_comment(card))
    return run_dir / "README.md"


def digest_comment(card: str) -> str:
    """A comment behind a card that tells whether it is still as it was written."""
    return f"\n<!-- {DIGEST_MARKER} {hashlib.sha256(card.encode()).hexdigest()} -->\n"


def is_unmodified_card(path: Path) -> bool:
    """Whether a card is there and as nextword wrote it, so that it may be written anew."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    card, marker, _ = text.rpartition(f"\n<!-- {DIGEST_MARKER} ")
    return bool(marker) and text == card + digest_comment(card)


# ---------------------------------------------------------------- of pre-training


def pretraining_card(run: RunData, stored_results: StoredResults) -> str:
    """The card of a model that continues text."""
    metadata = run.metadata
    metric_rows = [
        ("parameters", metadata.get("parameters")),
        ("context length", get_nested(metadata, "model", "context_length")),
        ("vocabulary", get_nested(metadata, "model", "vocab_size")),
        *training_metrics(run),
    ]
    model_kind = " ".join(str(metadata[key]) for key in ("preset", "size") if metadata.get(key))
    return PRETRAINING_CARD_TEMPLATE.substitute(
        name=escape_markdown(run.name),
        kind=escape_markdown(f"a {model_kind} model" if model_kind else "a model"),
        state="" if run.result else UNFINISHED_NOTICE,
        rows=markdown_table_rows(metric_rows),
        index=model_index(run, stored_results, "text-generation"),
        measured=evaluation_markdown(stored_results) + risks_markdown(stored_results),
        sample=sample_markdown(run),
        command=f"\n## How it was made\n\n{code_block(str(metadata['command']))}\n" if "command" in metadata else "",
    )


def training_metrics(run: RunData) -> list[tuple[str, Any]]:
    """What was read, and the loss on what was held out."""
    loss, is_text_loss = run.loss, run.task in (None, *LM_LOSS_TASKS)
    unit = "text" if run.task in (None, "continue") else "examples"
    return [
        ("tokens seen in training", run.last_value("tokens")),
        (f"training {unit}", format_data_counts(run.metadata, "train")),
        (f"validation {unit}", format_data_counts(run.metadata, "validation")),
        (
            f"validation loss, {'nats per token' if is_text_loss else validation_loss_unit(run)}",
            loss and round(loss, 4),
        ),
        ("perplexity", is_text_loss and loss and format_perplexity(loss)),
        ("bits per byte", run.bits_per_byte and round(run.bits_per_byte, 4)),
        ("training time", is_number(get_nested(run.result, "seconds")) and format_duration(run.result["seconds"])),
    ]


def markdown_table_rows(values: list[tuple[str, Any]]) -> str:
    """Those that are known, as rows of a table."""
    known = [(name, value) for name, value in values if value and (not isinstance(value, float) or is_number(value))]
    return "\n".join(f"| {name} | {escape_markdown(format_value(value))} |" for name, value in known)


def format_data_counts(metadata: Mapping[str, Any], split: str) -> str | None:
    counts = as_mapping(get_nested(metadata, "data", split))
    names = [name for name in ("documents", "examples", "tokens", "bytes") if is_number(counts.get(name))]
    if names == ["examples"]:
        return f"{counts['examples']:,}"
    return ", ".join(f"{counts[name]:,} {name}" for name in names) or None


def sample_markdown(run: RunData) -> str:
    samples = [record["sample"] for record in run.records if isinstance(record.get("sample"), dict)]
    sample = f"{samples[-1].get('prompt') or ''}{samples[-1].get('text') or ''}" if samples else ""
    return f"\n## What it writes\n\n{code_block(sample)}\n" if sample else ""


# ---------------------------------------------------------------- of a task

TASK_DESCRIPTIONS = {
    "classify": "It gives a text {answer}.",
    "entail": "It says how a second text follows from a first one: it gives the pair {answer}.",
    "similarity": "It says how alike two texts are: it gives the pair {answer}, whichever of them comes first.",
    "choose": "It chooses the answer to a question among those that are given with it.",
    "rewrite": "It answers a text with another one, as in the examples that it learned from.",
    "chat": "It goes on with a conversation, as the assistant.",
    "prefer": "It learned from pairs of answers to prefer the chosen one to the rejected one (DPO).",
    "continue": "It continues text: pre-training went on with more of it.",
}
PIPELINE_TAGS = {
    "classify": "text-classification", "entail": "text-classification", "similarity": "text-classification",
    "choose": "multiple-choice",
}  # fmt: skip
# What the examples in the card are about: the texts that `nextword predict` and the stock tokenizer are given.
EXAMPLE_INPUTS = {
    "classify": ("I would watch it again",),
    "entail": ("A man is asleep.", "Nobody is awake."),
    "similarity": ("A man is asleep.", "A man sleeps."),
    "choose": ("What do plants need to grow?", "light", "salt"),
}
EXAMPLE_PROMPT, EXAMPLE_TEXT_START, EXAMPLE_CHAT_MESSAGE = (
    "Where is the station?",
    "Once upon a time",
    "What is a verb?",
)
MAX_LISTED_LABELS = 20


def task_card(run: RunData, stored_results: StoredResults) -> str:
    """The card of a model that learned a task, or whose pre-training went on."""
    metadata = run.metadata
    task_rows = task_metadata(run)
    metric_rows = [
        *((name, task_rows[name]) for name in task_rows if name != "trained parameters"),
        ("parameters", metadata.get("parameters")),
        ("trained of them", metadata.get("trained_parameters")),
        ("context length", get_nested(metadata, "model", "context_length")),
        ("vocabulary", get_nested(metadata, "model", "vocab_size")),
        *training_metrics(run),
    ]
    command, pipeline = metadata.get("command"), PIPELINE_TAGS.get(str(run.task), "text-generation")
    return TASK_CARD_TEMPLATE.substitute(
        pipeline=pipeline,
        index=model_index(run, stored_results, pipeline),
        measured=evaluation_markdown(stored_results) + risks_markdown(stored_results),
        name=escape_markdown(run.name),
        about=describe_model(run),
        state="" if run.result else UNFINISHED_NOTICE,
        rows=markdown_table_rows(metric_rows),
        scores=scores_markdown(run),
        shell=shell_usage(run),
        python=python_usage(run),
        notes=special_tokens_note(run),
        adapter=adapter_usage(run),
        sample=sample_markdown(run),
        command=f"\n## How it was made\n\n{code_block(strip_directories(command))}\n"
        if isinstance(command, str)
        else "",
    )


def describe_model(run: RunData) -> str:
    """What it is and what it does, in a paragraph."""
    base, scratch = base_model_name(run), get_nested(run.metadata, "recipe", "scratch")
    with_lora = " by an adapter (LoRA)" if get_nested(run.metadata, "recipe", "lora") else ""
    model = f'the model "{base}"' if base else "a model"
    origin = f"from random weights, in the shape of {model}," if scratch else f"from {model}"
    answer = {"score": "a number", "labels": "those that fit of "}.get(task_kind(run), "one of ")
    labels = get_nested(run.metadata, "task", "labels")
    names = [str(label) for label in labels] if isinstance(labels, list) else []
    if names:
        shown = ", ".join(names[:MAX_LISTED_LABELS]) + (", …" if len(names) > MAX_LISTED_LABELS else "")
        answer += f"{len(names):,} labels ({shown})"
    description = TASK_DESCRIPTIONS.get(str(run.task), "").replace("{answer}", answer)
    return escape_markdown(f"This is a GPT that was trained with nextword {origin}{with_lora}. {description}")


def scores_markdown(run: RunData) -> str:
    """How well it does: in words, every score with its interval beside what needs no model, and what was forgotten."""
    results, forgotten = TaskResults.from_run(run), format_forgetting(run)
    blocks = [escape_markdown(results.summarize())] if results.model_score else []
    if len(results.by_system) * len(results.metric_names) > 1:
        table = [["", *map(escape_markdown, results.by_system)], ["---"] * (1 + len(results.by_system))]
        for name in results.metric_names:
            cells = [
                format_score_with_ci(scores[name], name) if name in scores else "–"
                for scores in results.by_system.values()
            ]
            table.append([METRICS[name].name, *cells])
        blocks.append("\n".join(f"| {' | '.join(row)} |" for row in table))
        blocks.append("In brackets: 95 % intervals.")
    if forgotten:
        blocks.append(escape_markdown(forgotten))
    return "\n## How well it does\n\n" + "\n\n".join(blocks) + "\n" if blocks else ""


def strip_directories(command: str) -> str:
    """A command whose paths from the root of a machine are cut down to their last names."""
    return re.sub(r"(?<![^\s=\"'])(?:[A-Za-z]:|~)?[/\\](?:[^\s/\\]*[/\\])*(?=[^\s/\\])", "", command)


# ---------------------------------------------------------------- how it is used


def task_kind(run: RunData) -> str:
    return str(get_nested(run.metadata, "task", "kind"))


def is_chat_model(run: RunData) -> bool:
    return bool(get_nested(run.metadata, "task", "chat"))


def shell_usage(run: RunData) -> str:
    if run.task == "continue":
        return shlex.join(["nextword", "generate", ".", EXAMPLE_TEXT_START])
    if is_chat_model(run):
        return "nextword chat ."
    texts = EXAMPLE_INPUTS.get(str(run.task), (EXAMPLE_PROMPT,))
    return (
        f"{shlex.join(['nextword', 'predict', '.', *texts])}\nnextword predict . examples.jsonl --out predictions.jsonl"
    )


def python_usage(run: RunData) -> str:
    """The stock class at work on the same example; it prints the answer on its last line."""
    if task_kind(run) in ("label", "labels", "score", "choice"):
        inputs, setup = tokenizer_arguments(run)
        answer = PREDICTION_SNIPPETS[task_kind(run)].format(logits=logits_expression(run))
        return CLASSIFICATION_CODE_TEMPLATE.substitute(inputs=inputs, setup=setup, answer=answer)
    if run.task == "continue":
        return GENERATION_CODE_TEMPLATE.substitute(
            inputs=f'inputs = tokenizer("{EXAMPLE_TEXT_START}", return_tensors="pt")', room=100, sampled=True
        )
    max_new_tokens = get_nested(run.metadata, "task", "answer_tokens")
    max_new_tokens = max_new_tokens if is_number(max_new_tokens) and max_new_tokens > 0 else 100
    inputs = CHAT_INPUTS_CODE if is_chat_model(run) else 'inputs = tokenizer("$prompt", return_tensors="pt")'
    inputs = inputs.replace("$prompt", EXAMPLE_CHAT_MESSAGE if is_chat_model(run) else EXAMPLE_PROMPT)
    return GENERATION_CODE_TEMPLATE.substitute(inputs=inputs, room=max_new_tokens, sampled=False)


def tokenizer_arguments(run: RunData) -> tuple[str, str]:
    """What the stock tokenizer takes (a text, two, both orders of two, a question with each choice), and what comes before."""
    texts = EXAMPLE_INPUTS.get(str(run.task), EXAMPLE_INPUTS["classify"])
    first, *others = (json.dumps(text) for text in texts)
    if run.task == "choose":
        return f"[{first}] * len(choices), choices, padding=True", f"choices = [{', '.join(others)}]\n"
    if run.task == "similarity":
        return "[one, two], [two, one], padding=True", f"one, two = {first}, {others[0]}\n"
    return ", ".join([first, *others]), ""


def logits_expression(run: RunData) -> str:
    """What the answer is read from: both orders of a pair are summed; of a choice there is one a row."""
    return {"similarity": "logits.sum(0)", "choose": "logits[:, 0]"}.get(str(run.task), "logits[0]")


PREDICTION_SNIPPETS = {
    "label": "print(model.config.id2label[int({logits}.argmax())])",
    "labels": "print([model.config.id2label[i] for i, p in enumerate({logits}.sigmoid().tolist()) if p > 0.5])",
    "score": "print({logits}.item())",
    "choice": "print(int({logits}.argmax()))  # the choice's place, from 0",
}


def special_tokens_note(run: RunData) -> str:
    """The one thing in which the stock tokenizer differs."""
    if run.task == "continue":
        return ""
    special_token = "<|user|>" if is_chat_model(run) else "<|start|>"
    return (
        f"\nA text that holds a marker's name, like `{special_token}`, is taken for the marker by the stock tokenizer; "
        "to nextword it is text.\n"
    )


def adapter_usage(run: RunData) -> str:
    """How PEFT puts the adapter on the base model; nothing where there is none, or no base model that was kept."""
    metadata = run.metadata
    if not get_nested(metadata, "recipe", "lora") or get_nested(metadata, "recipe", "scratch"):
        return ""
    has_classifier = task_kind(run) in ("label", "labels", "score", "choice")
    labels = get_nested(metadata, "task", "labels")
    outputs = len(labels) if isinstance(labels, list) and labels else 1
    python = ADAPTER_CODE_TEMPLATE.substitute(
        stock="AutoModelForSequenceClassification" if has_classifier else "AutoModelForCausalLM",
        arguments=f", num_labels={outputs}" if has_classifier else "",
        vocabulary=get_nested(metadata, "model", "vocab_size"),
    )
    base = base_model_name(run)
    base_note = " " + escape_markdown(f'("{base}")') if base else ""
    return ADAPTER_TEMPLATE.substitute(base=base_note, python=python)
