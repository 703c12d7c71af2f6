"""Labelled examples for the demo, from Python's documentation: which package is described, and what a function does."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from nextword.common.fs import atomic_write
from nextword.data.builtin_datasets import builtin_sources
from nextword.data.issues import IssueLog

NUM_PACKAGES = 8  # the classes: the packages with the most docstrings
MIN_SENTENCE_CHARS, MAX_SENTENCE_CHARS = 20, 200
PUBLIC_NAME = re.compile(r"[A-Za-z]\w*")  # of a module, class or function


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line; "" if there is none or its length is unsuitable."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    match = re.match(r".*?[.!?](?=\s|$)", paragraph)
    sentence = match[0] if match else ""
    return sentence if MIN_SENTENCE_CHARS <= len(sentence) <= MAX_SENTENCE_CHARS else ""


def documented_names() -> list[tuple[str, str]]:
    """Full name and first sentence of every public name that the standard library documents, each sentence once."""
    issues, names_by_sentence = IssueLog(), dict[str, str]()
    for source in builtin_sources("python-docs", issues):
        for document in source.read(issues):
            # "# module", then "## name(arguments)" and its docstring for each name
            title, *sections = "".join(document.chunks).split("\n## ")
            module = title.partition("\n")[0].removeprefix("# ").strip()
            for section in sections:
                heading, _, text = section.partition("\n")
                name = f"{module}.{heading.partition('(')[0].strip()}"
                is_public = all(PUBLIC_NAME.fullmatch(part) for part in name.split("."))
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
    packages = Counter(name.partition(".")[0] for name, _ in descriptions)
    labels = {package for package, _ in packages.most_common(NUM_PACKAGES)}
    examples: list[dict[str, Any]] = [
        {"text": text, "label": package} for name, text in descriptions if (package := name.partition(".")[0]) in labels
    ]
    conversations: list[dict[str, Any]] = []
    for name, text in descriptions:
        module, _, function = name.rpartition(".")
        question = {"role": "user", "content": f"What does {function} in {module} do?"}
        conversations.append({"messages": [question, {"role": "assistant", "content": text}]})
    paths = folder / "packages.jsonl", folder / "questions.jsonl"
    for path, rows in zip(paths, (examples, conversations), strict=True):
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return paths
