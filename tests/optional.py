"""Skips of tests for which an optional package is not installed. Knows no module of the package."""

import pytest


def need(*packages: str, extra: str | None = None) -> None:
    """Skip where a package is not installed; in CI that is a failure.

    Args:
        packages: Names to import.
        extra: The extra of mpichunk that brings them, if it is not called like the package.
    """
    for package in packages:
        cure = f"pip install 'mpichunk[{extra or package}]'"
        pytest.importorskip(package, reason=f"no {package}: {cure}")
