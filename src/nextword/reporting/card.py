"""A run folder's model card (`README.md`): what was measured, on what, and how the model is used."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextword.common.fs import write_durably
from nextword.common.results import Measurements
from nextword.reporting.card_results import evaluation_in_markdown, model_index, risks_in_markdown
from nextword.reporting.finetune_sections import TEXT_TASKS, held_out_loss, in_words, task_facts
from nextword.reporting.run_data import Run, at, duration, fenced, is_number, mapping, markdown, perplexity, readable
from nextword.reporting.task_results import METRICS, Outcome, base_name, forgetting_in_words
from nextword.reporting.templates import ADAPTER, CARD, CHAT_INPUTS, HEAD, TASK_CARD, WITH_ADAPTER, WORDS

SEAL = "written by nextword; sha-256 of what stands above:"
UNFINISHED = "\nThe training has not finished; these are the figures so far.\n"


def write_card(run: Path) -> Path:
    """Write RUN/README.md, a Hugging Face model card that says what was measured and nothing else; its path.

    Raises:
        NextwordError: not a run folder.
        CorruptFile: a file of it is damaged.
    """
    data, measured = Run.read(run), Measurements.read(run)
    card = language_card(data, measured) if data.task is None else task_card(data, measured)
    write_durably(run / "README.md", card + seal_of(card))
    return run / "README.md"


def seal_of(card: str) -> str:
    """A comment behind a card that tells whether it is still as it was written."""
    return f"\n<!-- {SEAL} {hashlib.sha256(card.encode()).hexdigest()} -->\n"


def is_own_card(path: Path) -> bool:
    """Whether a card is there and as nextword wrote it, so that it may be written anew."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    card, found, _ = text.rpartition(f"\n<!-- {SEAL} ")
    return bool(found) and text == card + seal_of(card)


# ---------------------------------------------------------------- of pre-training


def language_card(run: Run, found: Measurements) -> str:
    """The card of a model that continues text."""
    facts = run.facts
    measured = [
        ("parameters", facts.get("parameters")),
        ("context length", at(facts, "model", "context_length")),
        ("vocabulary", at(facts, "model", "vocab_size")),
        *figures(run),
    ]
    kind = " ".join(str(facts[key]) for key in ("preset", "size") if facts.get(key))
    return CARD.substitute(
        name=markdown(run.name),
        kind=markdown(f"a {kind} model" if kind else "a model"),
        state="" if run.result else UNFINISHED,
        rows=table_rows(measured),
        index=model_index(run, found, "text-generation"),
        measured=evaluation_in_markdown(found) + risks_in_markdown(found),
        sample=last_sample(run),
        command=f"\n## How it was made\n\n{fenced(str(facts['command']))}\n" if "command" in facts else "",
    )


def figures(run: Run) -> list[tuple[str, Any]]:
    """What was read, and the loss on what was held out."""
    loss, text = run.loss, run.task in (None, *TEXT_TASKS)
    what = "text" if run.task in (None, "continue") else "examples"
    return [
        ("tokens seen in training", run.last("tokens")),
        (f"training {what}", data_in_words(run.facts, "train")),
        (f"validation {what}", data_in_words(run.facts, "validation")),
        (f"validation loss, {'nats per token' if text else held_out_loss(run)}", loss and round(loss, 4)),
        ("perplexity", text and loss and perplexity(loss)),
        ("bits per byte", run.bits_per_byte and round(run.bits_per_byte, 4)),
        ("training time", is_number(at(run.result, "seconds")) and duration(run.result["seconds"])),
    ]


def table_rows(values: list[tuple[str, Any]]) -> str:
    """Those that are known, as rows of a table."""
    known = [(name, value) for name, value in values if value and (not isinstance(value, float) or is_number(value))]
    return "\n".join(f"| {name} | {markdown(readable(value))} |" for name, value in known)


def data_in_words(facts: Mapping[str, Any], part: str) -> str | None:
    counts = mapping(at(facts, "data", part))
    names = [name for name in ("documents", "examples", "tokens", "bytes") if is_number(counts.get(name))]
    if names == ["examples"]:
        return f"{counts['examples']:,}"
    return ", ".join(f"{counts[name]:,} {name}" for name in names) or None


def last_sample(run: Run) -> str:
    samples = [record["sample"] for record in run.records if isinstance(record.get("sample"), dict)]
    sample = f"{samples[-1].get('prompt') or ''}{samples[-1].get('text') or ''}" if samples else ""
    return f"\n## What it writes\n\n{fenced(sample)}\n" if sample else ""


# ---------------------------------------------------------------- of a task

ABOUT = {
    "classify": "It gives a text {answer}.",
    "entail": "It says how a second text follows from a first one: it gives the pair {answer}.",
    "similarity": "It says how alike two texts are: it gives the pair {answer}, whichever of them comes first.",
    "choose": "It chooses the answer to a question among those that are given with it.",
    "rewrite": "It answers a text with another one, as in the examples that it learned from.",
    "chat": "It goes on with a conversation, as the assistant.",
    "prefer": "It learned from pairs of answers to prefer the chosen one to the rejected one (DPO).",
    "continue": "It continues text: pre-training went on with more of it.",
}
PIPELINES = {
    "classify": "text-classification", "entail": "text-classification", "similarity": "text-classification",
    "choose": "multiple-choice",
}  # fmt: skip
# What the examples in the card are about: the texts that `nextword predict` and the stock tokenizer are given.
EXAMPLES = {
    "classify": ("I would watch it again",),
    "entail": ("A man is asleep.", "Nobody is awake."),
    "similarity": ("A man is asleep.", "A man sleeps."),
    "choose": ("What do plants need to grow?", "light", "salt"),
}
PROMPT, OPENING, MESSAGE = "Where is the station?", "Once upon a time", "What is a verb?"
LISTED_LABELS = 20


def task_card(run: Run, found: Measurements) -> str:
    """The card of a model that learned a task, or whose pre-training went on."""
    facts = run.facts
    known = task_facts(run)
    measured = [
        *((name, known[name]) for name in known if name != "trained parameters"),
        ("parameters", facts.get("parameters")),
        ("trained of them", facts.get("trained_parameters")),
        ("context length", at(facts, "model", "context_length")),
        ("vocabulary", at(facts, "model", "vocab_size")),
        *figures(run),
    ]
    command, pipeline = facts.get("command"), PIPELINES.get(str(run.task), "text-generation")
    return TASK_CARD.substitute(
        pipeline=pipeline,
        index=model_index(run, found, pipeline),
        measured=evaluation_in_markdown(found) + risks_in_markdown(found),
        name=markdown(run.name),
        about=about(run),
        state="" if run.result else UNFINISHED,
        rows=table_rows(measured),
        scores=scores_in_markdown(run),
        shell=shell_use(run),
        python=python_use(run),
        notes=markers_note(run),
        adapter=adapter_use(run),
        sample=last_sample(run),
        command=f"\n## How it was made\n\n{fenced(without_paths(command))}\n" if isinstance(command, str) else "",
    )


def about(run: Run) -> str:
    """What it is and what it does, in a paragraph."""
    base, scratch = base_name(run), at(run.facts, "recipe", "scratch")
    with_lora = " by an adapter (LoRA)" if at(run.facts, "recipe", "lora") else ""
    model = f'the model "{base}"' if base else "a model"
    begin = f"from random weights, in the shape of {model}," if scratch else f"from {model}"
    answer = {"score": "a number", "labels": "those that fit of "}.get(kind_of(run), "one of ")
    labels = at(run.facts, "task", "labels")
    names = [str(label) for label in labels] if isinstance(labels, list) else []
    if names:
        shown = ", ".join(names[:LISTED_LABELS]) + (", …" if len(names) > LISTED_LABELS else "")
        answer += f"{len(names):,} labels ({shown})"
    does = ABOUT.get(str(run.task), "").replace("{answer}", answer)
    return markdown(f"This is a GPT that was trained with nextword {begin}{with_lora}. {does}")


def scores_in_markdown(run: Run) -> str:
    """How well it does: in words, every score with its interval beside what needs no model, and what was forgotten."""
    outcome, forgotten = Outcome.of(run), forgetting_in_words(run)
    said = [markdown(outcome.in_words())] if outcome.model else []
    if len(outcome.by_who) * len(outcome.names) > 1:
        table = [["", *map(markdown, outcome.by_who)], ["---"] * (1 + len(outcome.by_who))]
        for name in outcome.names:
            cells = [in_words(scores[name], name) if name in scores else "–" for scores in outcome.by_who.values()]
            table.append([METRICS[name].name, *cells])
        said.append("\n".join(f"| {' | '.join(row)} |" for row in table))
        said.append("In brackets: 95 % intervals.")
    if forgotten:
        said.append(markdown(forgotten))
    return "\n## How well it does\n\n" + "\n\n".join(said) + "\n" if said else ""


def without_paths(command: str) -> str:
    """A command whose paths from the root of a machine are cut down to their last names."""
    return re.sub(r"(?<![^\s=\"'])(?:[A-Za-z]:|~)?[/\\](?:[^\s/\\]*[/\\])*(?=[^\s/\\])", "", command)


# ---------------------------------------------------------------- how it is used


def kind_of(run: Run) -> str:
    return str(at(run.facts, "task", "kind"))


def converses(run: Run) -> bool:
    return bool(at(run.facts, "task", "chat"))


def shell_use(run: Run) -> str:
    if run.task == "continue":
        return shlex.join(["nextword", "generate", ".", OPENING])
    if converses(run):
        return "nextword chat ."
    texts = EXAMPLES.get(str(run.task), (PROMPT,))
    return (
        f"{shlex.join(['nextword', 'predict', '.', *texts])}\nnextword predict . examples.jsonl --out predictions.jsonl"
    )


def python_use(run: Run) -> str:
    """The stock class at work on the same example; it prints the answer on its last line."""
    if kind_of(run) in ("label", "labels", "score", "choice"):
        inputs, setup = stock_inputs(run)
        answer = ANSWERS[kind_of(run)].format(logits=stock_logits(run))
        return HEAD.substitute(inputs=inputs, setup=setup, answer=answer)
    if run.task == "continue":
        return WORDS.substitute(inputs=f'inputs = tokenizer("{OPENING}", return_tensors="pt")', room=100, sampled=True)
    room = at(run.facts, "task", "answer_tokens")
    room = room if is_number(room) and room > 0 else 100
    inputs = CHAT_INPUTS if converses(run) else 'inputs = tokenizer("$prompt", return_tensors="pt")'
    inputs = inputs.replace("$prompt", MESSAGE if converses(run) else PROMPT)
    return WORDS.substitute(inputs=inputs, room=room, sampled=False)


def stock_inputs(run: Run) -> tuple[str, str]:
    """What the stock tokenizer takes (a text, two, both orders of two, a question with each choice), and what comes before."""
    texts = EXAMPLES.get(str(run.task), EXAMPLES["classify"])
    one, *others = (json.dumps(text) for text in texts)
    if run.task == "choose":
        return f"[{one}] * len(choices), choices, padding=True", f"choices = [{', '.join(others)}]\n"
    if run.task == "similarity":
        return "[one, two], [two, one], padding=True", f"one, two = {one}, {others[0]}\n"
    return ", ".join([one, *others]), ""


def stock_logits(run: Run) -> str:
    """What the answer is read from: both orders of a pair are summed; of a choice there is one a row."""
    return {"similarity": "logits.sum(0)", "choose": "logits[:, 0]"}.get(str(run.task), "logits[0]")


ANSWERS = {
    "label": "print(model.config.id2label[int({logits}.argmax())])",
    "labels": "print([model.config.id2label[i] for i, p in enumerate({logits}.sigmoid().tolist()) if p > 0.5])",
    "score": "print({logits}.item())",
    "choice": "print(int({logits}.argmax()))  # the choice's place, from 0",
}


def markers_note(run: Run) -> str:
    """The one thing in which the stock tokenizer differs."""
    if run.task == "continue":
        return ""
    marker = "<|user|>" if converses(run) else "<|start|>"
    return (
        f"\nA text that holds a marker's name, like `{marker}`, is taken for the marker by the stock tokenizer; "
        "to nextword it is text.\n"
    )


def adapter_use(run: Run) -> str:
    """How PEFT puts the adapter on the base model; nothing where there is none, or no base model that was kept."""
    facts = run.facts
    if not at(facts, "recipe", "lora") or at(facts, "recipe", "scratch"):
        return ""
    head = kind_of(run) in ("label", "labels", "score", "choice")
    labels = at(facts, "task", "labels")
    outputs = len(labels) if isinstance(labels, list) and labels else 1
    python = WITH_ADAPTER.substitute(
        stock="AutoModelForSequenceClassification" if head else "AutoModelForCausalLM",
        arguments=f", num_labels={outputs}" if head else "",
        vocabulary=at(facts, "model", "vocab_size"),
    )
    base = base_name(run)
    named = " " + markdown(f'("{base}")') if base else ""
    return ADAPTER.substitute(base=named, python=python)
