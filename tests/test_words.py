"""Counts in words: one of a thing is told in the singular, wherever a message counts."""

import re

import pytest

from mpichunk.words import agree, count
from tests.launch import REPOSITORY

NOUNS = (
    "ranks|blocks|patches|files|cores|threads|channels|voxels|repeats|hosts|attempts|axes|devices"
    "|shapes|names|batches|processes|inputs|outputs|tensors|bytes"
)
COUNTED = re.compile(
    r"(?:%d|\{[^{}\"']*(?:num_|num\b|len\(|size|count)[^{}\"']*\}) (?:\w+ )?(?:" + NOUNS + r")\b"
)
"""A number and a plural that stays one."""

NEVER_ONE = {
    # Told only where there are several, or none.
    "{num_sharing} ranks",
    "{num} ranks",
    "{num:,} blocks",
    "%d blocks",
    "{num_alike} ranks",
    "{len(ranks)} ranks",
    "{size} patches",
    "{mask.num_channels} channels",
    "{len(inputs)} inputs",
    "{len(outputs)} outputs",
    "{len(found)} tensors",
    "{len(tensors)} tensors",
    # Far more than one.
    "{work.num_blocks:,} blocks",
    "{num_blocks:.1e} blocks",
    "{num_files:,} chunk files",
    "{core.num_voxels} voxels",
}


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 patches"), (1, "1 patch"), (2, "2 patches"), (1234, "1,234 patches")],
)
def test_a_count_and_its_word_agree(number: int, words: str) -> None:
    assert count(number, "patch", "patches") == words
    assert count(number, "rank") == words.replace("patches", "ranks").replace("patch", "rank")
    assert agree(number, "is", "are") == ("is" if number == 1 else "are")


def test_no_message_counts_one_in_the_plural() -> None:
    found = {
        text
        for path in (REPOSITORY / "mpichunk").rglob("*.py")
        for text in COUNTED.findall(path.read_text())
    }
    assert found == NEVER_ONE, "use mpichunk.words.count, or say above why it cannot be one"
