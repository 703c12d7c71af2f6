"""Labelled examples for the demo, from Python's documentation: which package is described, and what a function does."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from nextword.common.fs import atomic_write
from nextword.data.builtin_datasets import builtin_sources
from nextword.data.documents import Document
from nextword.data.issues import IssueLog

NUM_PACKAGES = 8  # the classes: the packages with the most docstrings
MIN_SENTENCE_CHARS, MAX_SENTENCE_CHARS = 20, 200
PUBLIC_NAME = re.compile(r"[A-Za-z][\w.]*")


def iter_sections(document: Document) -> Iterator[tuple[str, str]]:
    """Full name and docstring of each section of a module's document ("# module", then "## name(arguments)" …)."""
    first, *rest = "".join(document.chunks).split("\n## ")
    module = first.partition("\n")[0].removeprefix("# ").strip()
    for section in rest:
        heading, _, text = section.partition("\n")
        yield f"{module}.{heading.partition('(')[0].strip()}", text.strip()


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line; "" if there is none or its length is unsuitable."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    match = re.match(r".*?[.!?](?=\s|$)", paragraph)
    sentence = match[0] if match else ""
    return sentence if MIN_SENTENCE_CHARS <= len(sentence) <= MAX_SENTENCE_CHARS else ""


def documented_names() -> list[tuple[str, str]]:
    """Full name and first sentence of every public name that the standard library documents, each sentence once."""
    issues, names_by_sentence = IssueLog(), dict[str, str]()
    for source in builtin_sources("python-docs", issues):
        for document in source.read(issues):
            for name, text in iter_sections(document):
                is_public = all(PUBLIC_NAME.fullmatch(part) and not part.startswith("_") for part in name.split("."))
                if is_public and (sentence := first_sentence(text)):
                    names_by_sentence.setdefault(sentence, name)
    return [(name, sentence) for sentence, name in names_by_sentence.items()]


def write_demo_data(folder: Path) -> tuple[Path, Path]:
    """Write the examples of the demo: the same files for the same Python.

    Returns:
        The paths of FOLDER/packages.jsonl (text and label: which package is this?) and of FOLDER/questions.jsonl
        (conversations: what does NAME do?).
    """
    descriptions = documented_names()
    packages = [name.partition(".")[0] for name, _ in descriptions]
    top_packages = {package for package, _ in Counter(packages).most_common(NUM_PACKAGES)}
    labelled_examples = [
        {"text": text, "label": package}
        for package, (_, text) in zip(packages, descriptions, strict=True)
        if package in top_packages
    ]
    conversations = [{"messages": _question_and_answer(name, text)} for name, text in descriptions]
    return (
        _write_jsonl(folder / "packages.jsonl", labelled_examples),
        _write_jsonl(folder / "questions.jsonl", conversations),
    )


def _question_and_answer(name: str, description: str) -> list[dict[str, str]]:
    module, _, function = name.rpartition(".")
    return [
        {"role": "user", "content": f"What does {function} in {module} do?"},
        {"role": "assistant", "content": description},
    ]


def _write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
