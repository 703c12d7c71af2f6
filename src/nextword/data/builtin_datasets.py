"""Corpora that go by a name: the documentation inside the reader's own Python, and a few well-known ones from the
Hub.

Each gives the same `Source`s that files give, so that names and paths mix freely.
"""

import ast
import functools
import inspect
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from nextword.common.errors import MissingDependencyError, NextwordError, UsageError
from nextword.data.decoding import rechunk, replace_surrogates
from nextword.data.documents import (
    Document,
    IssueLog,
    SourceFile,
    read_documents,
    read_text_rows,
)

BUILTIN_DATASETS = {
    "python-docs": "the documentation inside your own Python: about 2 MB of English prose, no network needed",
    "tinystories": "TinyStories, 2 million short stories in a small child's words (Hub, roneneldan/TinyStories, 1 GB)",
    "wikitext": "WikiText-103, 28 thousand good articles of Wikipedia (Hub, Salesforce/wikitext, 0.3 GB)",
    "fineweb-edu": "FineWeb-Edu, ten billion tokens of educational pages (Hub, HuggingFaceFW/fineweb-edu, 28 GB)",
}
_HUB_DATASETS = {  # name: (repository, the files of its training part, whether a row is a line of an article)
    "tinystories": ("roneneldan/TinyStories", "data/train-*.parquet", False),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1/train-*.parquet", True),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet", False),
}
_EXCLUDED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def builtin_sources(name: str, problems: IssueLog) -> list[SourceFile]:
    """The files of a named corpus, downloaded where they are not here yet.

    Raises `UsageError` for an unknown name, `MissingExtra` and `NextwordError` where a download cannot be had.
    """
    if name not in BUILTIN_DATASETS:
        raise UsageError(f"{name}: no corpus of that name; there are {', '.join(BUILTIN_DATASETS)}")
    if name == "python-docs":
        return _python_docs_sources(problems)
    repository, pattern, rows_are_lines = _HUB_DATASETS[name]
    folder, paths = download_hub_files(name, repository, pattern)
    read = _read_wikitext_articles if rows_are_lines else read_documents
    return [SourceFile(f"{name}/{path.relative_to(folder).as_posix()}", path, partial(read, path)) for path in paths]


def download_hub_files(name: str, repository: str, pattern: str) -> tuple[Path, list[Path]]:
    """The local folder of a Hub dataset, and those of its files that a pattern names, downloaded where they are not here
    yet; `name` is what the person called it.

    Raises `MissingExtra` without huggingface_hub, and `NextwordError` where nothing can be had.
    """
    folder = _download_snapshot(repository, pattern)
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise NextwordError(f"{name}: {repository} holds no files {pattern} any more; download it and name its folder")
    return folder, paths


def _download_snapshot(repository: str, pattern: str) -> Path:
    """The local folder that holds a Hub dataset's files."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(f"{repository} from the Hub", "hub") from error
    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=[pattern]))
    except (OSError, ValueError, RuntimeError) as error:  # what the Hub's own errors and its network's descend from
        raise NextwordError(
            f"{repository} could not be downloaded: {error}. Try again with a network, or name a folder of your own"
        ) from error


def _read_wikitext_articles(path: Path, problems: IssueLog) -> Iterator[Document]:
    """WikiText has a row for each line; a line ` = Title = ` opens an article, and an article is a document.

    The one article that goes on in the next file is two documents.
    """
    lines: list[str] = []
    first_row = 1
    for row, line in read_text_rows(path, problems):
        if _is_article_title(line) and lines:
            if "".join(lines).strip():
                yield Document(path, first_row, rechunk(lines))
            lines, first_row = [], row
        lines.append(line if line.endswith("\n") else line + "\n")
    if "".join(lines).strip():
        yield Document(path, first_row, rechunk(lines))


def _is_article_title(line: str) -> bool:
    """` = Title = `, and no section such as ` = = Section = = `."""
    line = line.strip()
    return len(line) > 4 and line.startswith("= ") and line.endswith(" =") and not line.startswith("= =")


def _python_docs_sources(problems: IssueLog) -> list[SourceFile]:
    """The sources of the standard library: a document for each module, one for each topic of `help()`."""
    library = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, subdirs, files in os.walk(library):
        subdirs[:] = [name for name in subdirs if name not in _EXCLUDED_DIRS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    sources = []
    for path in sorted(paths):
        name = path.relative_to(library).as_posix()
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        read = partial(
            _read_docs, path, _help_topics if name == "pydoc_data/topics.py" else partial(_module_docs, module)
        )
        sources.append(SourceFile(f"python-docs/{name}", path, read))
    if not sources:
        raise NextwordError(
            f"{library}: this Python comes without the sources of its library; name a corpus of your own"
        )
    return sources


def _read_docs(
    path: Path, extract: Callable[[Path, int], list[tuple[int, str]]], problems: IssueLog
) -> Iterator[Document]:
    """A document for each line and text that `read` finds in a source file."""
    try:
        texts = extract(path, path.stat().st_mtime_ns)
    except (SyntaxError, ValueError, RecursionError, OSError) as error:
        problems.add(path, getattr(error, "lineno", None), "a source that Python does not parse", str(error))
        return
    for line, text in texts:
        yield Document(path, line, rechunk([text]))


def _parse_source(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in a string of somebody else's
        return ast.parse(path.read_bytes())


# A corpus is read three times, and parsing is slow: the texts of a library, two megabytes, are kept. The time of the
# file's last change is there to tell an edited file from the one that was read.
@functools.lru_cache(maxsize=4096)
def _module_docs(name: str, path: Path, mtime_ns: int) -> list[tuple[int, str]]:
    """What a module says about itself, its classes and its functions, in order, as one text; [] where nothing."""
    tree = _parse_source(path)
    parts = [f"# {name}", *([_clean_docstring(text)] if (text := ast.get_docstring(tree, clean=False)) else [])]
    for heading, text in _iter_docstrings(tree.body, ""):
        parts += [f"## {heading}", text]
    return [(1, "\n\n".join(parts) + "\n")] if len(parts) > 1 else []


@functools.lru_cache(maxsize=1)
def _help_topics(path: Path, mtime_ns: int) -> list[tuple[int, str]]:
    """The topics of `help()`: the one dictionary that the file assigns, read as a literal."""
    for node in _parse_source(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            keys, texts = node.value.keys, ast.literal_eval(node.value).values()
            return [
                (key.lineno if key else 1, _clean_docstring(text) + "\n") for key, text in zip(keys, texts, strict=True)
            ]
    return []


def _iter_docstrings(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    """Heading and text of each class and function that has a docstring, those inside an `if` or a `try` included."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            if text := ast.get_docstring(node, clean=False):
                yield prefix + node.name, _clean_docstring(text)
            yield from _iter_docstrings(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node, clean=False):
                yield (
                    f"{prefix}{node.name}({_format_arguments(node.args, is_method=bool(prefix))})",
                    _clean_docstring(text),
                )
        elif isinstance(node, ast.If | ast.Try):
            yield from _iter_docstrings([*node.body, *node.orelse], prefix)


def _format_arguments(arguments: ast.arguments, is_method: bool) -> str:
    names = ast.unparse(arguments).split(", ")
    return ", ".join(names[1:] if is_method and names[0] in ("self", "cls") else names)


def _clean_docstring(docstring: str) -> str:
    """Without the indentation of the source, and without half surrogates, which a literal may hold."""
    return replace_surrogates(inspect.cleandoc(docstring)).strip()
