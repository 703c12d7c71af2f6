"""Labelled examples out of the documentation inside every Python: which package speaks, and what something does."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from nextword.common.fs import write_durably
from nextword.data.builtin_datasets import named_sources
from nextword.data.documents import Document, Problems

PACKAGES = 8  # those with the most docstrings are told apart
LONGEST = 200  # characters of a docstring's first sentence
ORDINARY = re.compile(r"[A-Za-z][\w.]*")  # a name that can be asked for; no __init__, nothing private


def sections(document: Document) -> Iterator[tuple[str, str]]:
    """Heading and text of each section of a module's document ("# module", then "## name(arguments)" …)."""
    first, *others = "".join(document.pieces).split("\n## ")
    module = first.partition("\n")[0].removeprefix("# ").strip()
    for section in others:
        heading, _, text = section.partition("\n")
        yield f"{module}.{heading.partition('(')[0].strip()}", text.strip()


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line; "" where it is none, or a long one."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    match = re.match(r".*?[.!?](?=\s|$)", paragraph)
    sentence = match[0] if match else ""
    return sentence if 20 <= len(sentence) <= LONGEST else ""


def described() -> list[tuple[str, str]]:
    """(full name, first sentence) of everything public that the standard library describes, each sentence once."""
    problems, found = Problems(), {}
    for source in named_sources("python-docs", problems):
        for document in source.read(problems):
            for name, text in sections(document):
                plain = all(ORDINARY.fullmatch(part) and not part.startswith("_") for part in name.split("."))
                if plain and (sentence := first_sentence(text)):
                    found.setdefault(sentence, name)
    return [(name, sentence) for sentence, name in found.items()]


def write_examples(folder: Path) -> tuple[Path, Path]:
    """FOLDER/packages.jsonl (text, label: which package says this?) and FOLDER/questions.jsonl (conversations: what does
    NAME do?), the same for the same Python; their paths."""
    both = described()
    packages = Counter(name.partition(".")[0] for name, _ in both)
    known = {package for package, _ in packages.most_common(PACKAGES)}
    labelled = (
        {"text": text, "label": name.partition(".")[0]} for name, text in both if name.partition(".")[0] in known
    )
    asked = (
        {
            "messages": [
                {"role": "user", "content": f"What does {name.rpartition('.')[2]} in {name.rpartition('.')[0]} do?"},
                {"role": "assistant", "content": text},
            ]
        }
        for name, text in both
    )
    return _lines(folder / "packages.jsonl", labelled), _lines(folder / "questions.jsonl", asked)


def _lines(path: Path, rows: Iterable[object]) -> Path:
    write_durably(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
