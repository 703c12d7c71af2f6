"""The structure of the package, computed from its source: packages, their imports, and lines of code."""

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def package_of(path: Path, root: Path) -> str:
    """The package of a file: its folder below the root, or the module itself at the top."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, except those under ``if TYPE_CHECKING``."""
    nodes = [node]
    while nodes:
        for child in ast.iter_child_nodes(nodes.pop()):
            if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                yield child
                nodes.append(child)


@cache
def imported_modules(path: Path) -> list[str]:
    """The modules that a file imports at run time, at its top or inside functions, by their full names."""
    names: list[str] = []
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def package_imports(root: Path) -> dict[str, set[str]]:
    """The packages that each package imports at run time. The three files at the top are left out."""
    imports: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        if path.parent == root:
            continue
        package = package_of(path, root)
        targets = {name.split(".")[1] for name in imported_modules(path) if name.startswith(f"{root.name}.")}
        imports.setdefault(package, set()).update(targets - {package, "_version", "__version__"})
    return imports


def lines_of_code(path: Path) -> int:
    """The lines of a file without blank lines, comments and docstrings."""
    source = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)
