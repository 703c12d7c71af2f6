"""The sources of a corpus: files, folders, and built-in datasets, which are known by name.

"python-docs" is read from the standard library that runs this program. The other datasets are downloaded from the
Hugging Face Hub. The labeled examples of the demo are made from "python-docs".
"""

import ast
import functools
import inspect
import json
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from nextword.common.errors import NextwordError, UsageError, import_optional
from nextword.common.fs import atomic_write
from nextword.data.decoding import rechunk
from nextword.data.issues import IssueLog, replace_surrogates
from nextword.data.readers import Document, SourceFile, find_files, read_documents, read_text_rows

BUILTIN_DATASETS = {
    "python-docs": "the documentation inside your own Python: about 2 MB of English prose, no network needed",
    "tinystories": "TinyStories, 2 million short stories in a small child's words (Hub, roneneldan/TinyStories, 1 GB)",
    "wikitext": "WikiText-103, 28 thousand good articles of Wikipedia (Hub, Salesforce/wikitext, 0.3 GB)",
    "fineweb-edu": "FineWeb-Edu, ten billion tokens of educational pages (Hub, HuggingFaceFW/fineweb-edu, 28 GB)",
}


# The repository of a dataset on the Hub, and the files of its training split.
_HUB_DATASETS = {
    "tinystories": ("roneneldan/TinyStories", "data/train-*.parquet"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1/train-*.parquet"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
}
_ARTICLE_TITLE = re.compile("= (?!=).+ =", re.DOTALL)  # and not a section, = = Section = =
NUM_PACKAGES = 8  # the classes: the packages with the most docstrings
MIN_SENTENCE_CHARS, MAX_SENTENCE_CHARS = 20, 200
PUBLIC_NAME = re.compile(r"[A-Za-z]\w*")  # of a module, class or function
_EXCLUDED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def find_sources(
    corpora: Iterable[str | Path], issues: IssueLog, text_column: str | None = None, exclude: Path | None = None
) -> list[SourceFile]:
    """The source files of paths and built-in datasets, in the order given. For the arguments see `find_files`.

    Raises:
        UsageError: a path does not exist.
        MissingDependencyError, NextwordError: a dataset cannot be downloaded.
    """
    sources: list[SourceFile] = []
    for corpus in corpora:
        if str(corpus) in BUILTIN_DATASETS:
            sources += builtin_sources(str(corpus), issues)
        else:
            sources += find_files([Path(corpus)], issues, text_column, exclude)
    return sources


def builtin_sources(name: str, issues: IssueLog) -> list[SourceFile]:
    """The source files of a built-in dataset, downloaded if necessary.

    Raises:
        UsageError: there is no dataset of this name.
        MissingDependencyError: `huggingface_hub` is not installed.
        NextwordError: the download fails.
    """
    if name == "python-docs":
        return _python_docs_sources()
    if name not in _HUB_DATASETS:
        raise UsageError(f"{name}: no built-in dataset of that name; there are {', '.join(BUILTIN_DATASETS)}")
    folder, paths = download_hub_files(name, *_HUB_DATASETS[name])
    read = _read_wikitext_articles if name == "wikitext" else read_documents
    return [SourceFile(f"{name}/{path.relative_to(folder).as_posix()}", path, partial(read, path)) for path in paths]


def download_hub_files(name: str, repository: str, pattern: str) -> tuple[Path, list[Path]]:
    """Download the files of a Hub dataset that match a pattern, unless they are in the local cache.

    Args:
        name: the dataset's name in messages.
        repository: the Hub's identifier, for example ``"roneneldan/TinyStories"``.
        pattern: a glob pattern.

    Returns:
        The local folder of the dataset, and the paths of the files.

    Raises:
        MissingDependencyError: `huggingface_hub` is not installed.
        NextwordError: the download fails, or no file matches.
    """
    hub = import_optional("huggingface_hub", f"{repository} from the Hub", "hub")
    try:
        folder = Path(hub.snapshot_download(repository, repo_type="dataset", allow_patterns=[pattern]))
    except (OSError, ValueError, RuntimeError) as error:  # the base classes of the errors of the Hub and its network
        raise NextwordError(
            f"{repository} could not be downloaded: {error}. Try again with a network, or name a folder of your own"
        ) from error
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise NextwordError(f"{name}: {repository} holds no files {pattern} any more; download it and name its folder")
    return folder, paths


def _read_wikitext_articles(path: Path, issues: IssueLog) -> Iterator[Document]:
    """The articles of WikiText, which has a row for each line. A line ` = Title = ` begins an article.

    The article that continues in the next file becomes two documents.
    """

    lines: list[str] = []
    first_row = 1
    for row, line in chain(read_text_rows(path, issues), [(0, "= End of the file =")]):
        if lines and _ARTICLE_TITLE.fullmatch(line.strip()):
            if any(map(str.strip, lines)):
                yield Document(path, first_row, rechunk(lines))
            lines, first_row = [], row
        lines.append(line if line.endswith("\n") else line + "\n")


# ---------------------------------------------------------------- python-docs


def _python_docs_sources() -> list[SourceFile]:
    """The source files of the standard library: a document for each module, and for each topic of `help()`."""
    library = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, subdirs, files in os.walk(library):
        subdirs[:] = [name for name in subdirs if name not in _EXCLUDED_DIRS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    sources: list[SourceFile] = []
    for path in sorted(paths):
        name = path.relative_to(library).as_posix()
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        sources.append(SourceFile(f"python-docs/{name}", path, partial(_read_docs, path, module)))
    if not sources:
        raise NextwordError(f"{library}: this Python has no sources of its standard library; name a folder of texts")
    return sources


def _read_docs(path: Path, module: str, issues: IssueLog) -> Iterator[Document]:
    """The documents of a source file."""
    try:
        texts = _extract_docs(path, module, path.stat().st_mtime_ns)
    except (SyntaxError, ValueError, RecursionError, OSError) as error:
        issues.add(path, getattr(error, "lineno", None), "a source that Python does not parse", str(error))
        return
    for line, text in texts:
        yield Document(path, line, rechunk([text]))


# A corpus is read three times, and parsing is slow: the documentation, two megabytes, is cached. The modification time
# invalidates the entry of a file that was edited.
@functools.lru_cache(maxsize=4096)
def _extract_docs(path: Path, module: str, mtime_ns: int) -> list[tuple[int, str]]:
    """Line and text of each document of a source file.

    The docstrings of a module, its classes and its functions, in order, are one text. The topics of `help()` are the
    values of the dictionary that pydoc_data/topics.py assigns.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in a string
        tree = ast.parse(path.read_bytes())
    if module == "pydoc_data.topics":
        return [
            (key.lineno if key else 1, _clean_docstring(text) + "\n")
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
            for key, text in zip(node.value.keys, ast.literal_eval(node.value).values(), strict=True)
        ]
    parts = [f"# {module}", *([_clean_docstring(text)] if (text := ast.get_docstring(tree, clean=False)) else [])]
    for heading, text in _iter_docstrings(tree.body, ""):
        parts += [f"## {heading}", text]
    return [(1, "\n\n".join(parts) + "\n")] if len(parts) > 1 else []


def _iter_docstrings(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    """Heading and docstring of each class and function, those inside an `if` or a `try` included."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _iter_docstrings([*node.body, *node.orelse], prefix)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            heading = prefix + node.name
            if not isinstance(node, ast.ClassDef):
                arguments = ast.unparse(node.args)
                heading += f"({re.sub('^(self|cls)(, |$)', '', arguments) if prefix else arguments})"
            if text := ast.get_docstring(node, clean=False):
                yield heading, _clean_docstring(text)
            if isinstance(node, ast.ClassDef):
                yield from _iter_docstrings(node.body, f"{heading}.")


def _clean_docstring(docstring: str) -> str:
    """The text without indentation, and without lone surrogates, which a literal may hold."""
    return replace_surrogates(inspect.cleandoc(docstring)).strip()


# ---------------------------------------------------------------- the examples of the demo


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
