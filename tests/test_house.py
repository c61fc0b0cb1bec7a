"""The size of the house: files and functions stay small, and each module says what it is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import REPOSITORY

MODULES = sorted((REPOSITORY / "mpichunk").rglob("*.py"))
TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and length of each function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, int(node.end_lineno or 0) - node.lineno + 1


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_module_is_small_and_says_what_it_is(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES_OF_A_FILE
    assert [name for name, n in functions(path) if n > MOST_LINES_OF_A_FUNCTION] == []
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_test_file_is_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES_OF_A_FILE


def test_there_are_modules_and_tests() -> None:
    assert len(MODULES) > 20 and len(TESTS) > 20
