"""The field's terms in help, messages and documents: phrases of the project's former private vocabulary do not come back."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import nextword
from nextword.commands.cli import GROUPS, build_app

ROOT = Path(nextword.__file__).parent
REPOSITORY = Path(__file__).parents[1]
BANNED = {
    r"where (nothing|none|not|it) (is|was) (said|given|told)": "default: …",
    r"where not given": "default: …",
    r"so (many|much) (tokens|steps|items|examples|parameters|processes|times)": "N, the number of",
    r"\b(is|are|was|were) (said|told)\b": "is printed, is reported, is listed",
    r"\ba look at\b|\blooks at (the )?held-out": "an evaluation on the validation set",
    r"\bheld[- ]out (text|part|examples|documents)\b": "validation set",
    r"\bhold-out\b": "validation set",
    r"\bby heart\b": "has memorized",
    r"\bgo(es)? on from\b": "continues",
    r"\bin company\b": "distributed",
    r"\bon paper\b": "an estimate",
    r"\bbeside the steps\b": "asynchronously",
    r"\b(goes|went|gone) astray\b": "loss spike",
    r"\bturns? back\b|\bdetours?\b(?!\.jsonl)": "rolls back, skips batches",
    r"\bwhom it favou?rs\b": "social bias",
    r"\bto be read first\b": "flagged",
    r"\bthe proof is owing\b": "not verified",
    r"\bfewer bits\b": "quantized",
    r"\bof (one's|your|its) own (text|domain|language)\b": "your own text",
    r"\bfrom where to where\b": "the range",
    r"\bthe middle (one|of three)\b": "the median",
    r"\bkeys and values of earlier\b": "KV cache",
    r"\bthe way down\b|\bway home\b": "decay",
    r"\bshare anew\b|\bbegin anew\b": "reset",
    r"\bnothing amiss\b": "reference value",
    r"\bnot told apart\b": "not significant",
    r"\bverdicts?\b": "scores, evaluates",
    r"\bstock (class|director|model|tokenizer|template|loop)": "the class of transformers, a Hugging Face directory",
    r"\bso-manieth\b": "every n-th",
    r"\bin turns?, so that\b": "interleaved",
}


def phrases_in(text: str) -> list[str]:
    """The banned phrases of a text, with what to write instead."""
    unwrapped = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
    return [
        f"{match[0]!r}: write {better!r}"
        for pattern, better in BANNED.items()
        for match in re.finditer(pattern, unwrapped, re.IGNORECASE)
    ]


@pytest.mark.parametrize("name", ["", *(name for names in GROUPS.values() for name in names)])
def test_help(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    build_app(0.0)([name, "--help"] if name else ["--help"])
    assert not phrases_in(capsys.readouterr().out)


def test_messages_and_docstrings():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isidentifier():
                wrong += [f"{path}:{node.lineno}: {phrase}" for phrase in phrases_in(node.value)]
    assert not wrong, "\n".join(wrong)


def test_docstrings_and_comments_of_benchmarks_and_tests():
    wrong = []
    for path in [*sorted(REPOSITORY.glob("benchmarks/*.py")), *sorted(REPOSITORY.glob("tests/*.py"))]:
        text = path.read_text(encoding="utf-8")
        docstrings = [
            ast.get_docstring(node) or ""
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        wrong += [f"{path}: {phrase}" for passage in docstrings + comments for phrase in phrases_in(passage)]
    assert not wrong, "\n".join(wrong)


def test_documents():
    documents = [REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    wrong = [
        f"{path}: {phrase}"
        for path in [*documents, *sorted(REPOSITORY.glob("docs/**/*.md"))]
        for phrase in phrases_in(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


TERMS = (
    "early stopping",
    "gradient accumulation",
    "mixed precision",
    "tensor parallelism",
    "KV cache",
    "checkpointing",
    "weight decay",
    "LoRA",
    "quantization",
)


@pytest.mark.parametrize("term", TERMS)
def test_the_documents_are_found_by_the_fields_terms(term):
    """Beside the reference, which is generated from the help, one more document explains the term."""
    documents = [
        path for path in sorted(REPOSITORY.glob("docs/*.md")) if path.name not in ("experiments.md", "benchmarks.md")
    ]
    names = [path.name for path in documents if term.lower() in path.read_text(encoding="utf-8").lower()]
    assert "reference.md" in names
    assert len(names) > 1, names
