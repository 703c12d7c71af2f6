"""Labelled examples out of the documentation inside every Python: which package speaks, and what something does."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from nextword.common.fs import atomic_write
from nextword.data.builtin_datasets import builtin_sources
from nextword.data.documents import Document, IssueLog

NUM_PACKAGES = 8  # those with the most docstrings are told apart
MAX_SENTENCE_CHARS = 200  # characters of a docstring's first sentence
PUBLIC_NAME = re.compile(r"[A-Za-z][\w.]*")  # a name that can be asked for; no __init__, nothing private


def iter_sections(document: Document) -> Iterator[tuple[str, str]]:
    """Heading and text of each section of a module's document ("# module", then "## name(arguments)" …)."""
    first, *rest = "".join(document.chunks).split("\n## ")
    module = first.partition("\n")[0].removeprefix("# ").strip()
    for section in rest:
        heading, _, text = section.partition("\n")
        yield f"{module}.{heading.partition('(')[0].strip()}", text.strip()


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line; "" where it is none, or a long one."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    match = re.match(r".*?[.!?](?=\s|$)", paragraph)
    sentence = match[0] if match else ""
    return sentence if 20 <= len(sentence) <= MAX_SENTENCE_CHARS else ""


def documented_names() -> list[tuple[str, str]]:
    """(full name, first sentence) of everything public that the standard library describes, each sentence once."""
    problems, names_by_sentence = IssueLog(), {}
    for source in builtin_sources("python-docs", problems):
        for document in source.read(problems):
            for name, text in iter_sections(document):
                is_public = all(PUBLIC_NAME.fullmatch(part) and not part.startswith("_") for part in name.split("."))
                if is_public and (sentence := first_sentence(text)):
                    names_by_sentence.setdefault(sentence, name)
    return [(name, sentence) for sentence, name in names_by_sentence.items()]


def write_demo_data(folder: Path) -> tuple[Path, Path]:
    """FOLDER/packages.jsonl (text, label: which package says this?) and FOLDER/questions.jsonl (conversations: what does
    NAME do?), the same for the same Python; their paths."""
    descriptions = documented_names()
    packages = Counter(name.partition(".")[0] for name, _ in descriptions)
    top_packages = {package for package, _ in packages.most_common(NUM_PACKAGES)}
    labelled_examples = (
        {"text": text, "label": name.partition(".")[0]}
        for name, text in descriptions
        if name.partition(".")[0] in top_packages
    )
    conversations = (
        {
            "messages": [
                {"role": "user", "content": f"What does {name.rpartition('.')[2]} in {name.rpartition('.')[0]} do?"},
                {"role": "assistant", "content": text},
            ]
        }
        for name, text in descriptions
    )
    return _write_jsonl(folder / "packages.jsonl", labelled_examples), _write_jsonl(
        folder / "questions.jsonl", conversations
    )


def _write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
