"""Gives each rank of a node a device of its own among those that it sees.

Pure; knows neither ranks nor devices, only rows of names.
"""

from collections.abc import Sequence


def match(choices: Sequence[Sequence[str]]) -> list[str | None]:
    """Give as many rows as possible a name of their own.

    Rows take in turn the first of their names that is left. Where none is left, others are moved
    (augmenting paths; H. W. Kuhn, The Hungarian method for the assignment problem, 1955): a row
    that may choose makes room for one that may not.

    Args:
        choices: For each row the names that it may take, the preferred one first.

    Returns:
        The name of each row, None for one that had to go away empty.
    """
    owner: dict[str, int] = {}
    for row, names in enumerate(choices):
        free = next((name for name in names if name not in owner), None)
        if free is not None:
            owner[free] = row
        else:
            _make_room(row, choices, owner, set())
    names_of = {row: name for name, row in owner.items()}
    return [names_of.get(row) for row in range(len(choices))]


def _make_room(
    row: int, choices: Sequence[Sequence[str]], owner: dict[str, int], seen: set[str]
) -> bool:
    """Give `row` a name by moving others, and return whether that was possible."""
    for name in choices[row]:
        if name in seen:
            continue
        seen.add(name)
        if name not in owner or _make_room(owner[name], choices, owner, seen):
            owner[name] = row
            return True
    return False
