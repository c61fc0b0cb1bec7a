"""Which Python files beside a network's own file it imports: their bytes are the network, too.

Reads import statements and executes nothing. Knows no torch; modules that are imported by a name
made up while the program runs are not found.
"""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path


def imported_files(path: Path) -> list[Path]:
    """Return the files below the folder of a Python file that it imports, sorted.

    Those that these import belong to them, and so on; the file itself does not. One that would be
    found elsewhere first, as a module of Python itself, counts too: it does no harm.
    """
    root, found, todo = path.parent, set[Path](), [path]
    while todo:
        file = todo.pop()
        for other in _imports(file, root):
            if other not in found and other != path:
                found.add(other)
                todo.append(other)
    return sorted(found)


def _imports(path: Path, root: Path) -> Iterator[Path]:
    """Yield the files below `root` that one file imports."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(root, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = root
            if node.level:
                base = path.parents[min(node.level, len(path.parents)) - 1]
            if base != root and root not in base.parents:
                continue
            prefix = f"{node.module}." if node.module else ""
            for alias in node.names:
                # What is imported from a package may be a module of it.
                yield from _files(base, prefix + alias.name)


def _tree(path: Path) -> ast.AST:
    """Return what a file says; nothing where it is no Python: whoever executes it will see."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ast.Module(body=[], type_ignores=[])


def _files(folder: Path, dotted: str) -> Iterator[Path]:
    """Yield the files that importing a dotted name executes, as far as they are in this folder."""
    for part in dotted.split("."):
        for candidate in (folder / f"{part}.py", folder / part / "__init__.py"):
            if file := _file(candidate):
                yield file
        folder = folder / part


def _file(path: Path) -> Path | None:
    try:
        return path if path.is_file() else None
    except OSError:
        return None
