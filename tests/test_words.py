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
    ("backends/devices/binding.py", "{len(ranks)} ranks"),
    ("backends/onnxruntime.py", "{len(inputs)} inputs"),
    ("backends/onnxruntime.py", "{len(outputs)} outputs"),
    ("backends/openvino/model.py", "{len(found)} tensors"),
    ("backends/pytorch/engine.py", "{len(tensors)} tensors"),
    ("backends/pytorch/exported.py", "{len(inputs)} inputs"),
    ("bench/report.py", "{size} patches"),
    ("geometry/masking.py", "{mask.num_channels} channels"),
    ("job/exit_status.py", "%d blocks"),
    ("job/exit_status.py", "{num:,} blocks"),
    ("job/memory_check.py", "{num_sharing} ranks"),
    ("job/host_memory.py", "{num} ranks"),
    ("schedule/breaker.py", "{num_alike} ranks"),
    # Far more than one.
    ("block/nonfinite.py", "{core.num_voxels} voxels"),
    ("plan/advice.py", "{num_files:,} chunk files"),
    ("plan/advice.py", "{work.num_blocks:,} blocks"),
    ("plan/plan.py", "{num_blocks:.1e} blocks"),
}
"""Where the plural may stay, file by file: the same words are wrong where it can be one."""


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 patches"), (1, "1 patch"), (2, "2 patches"), (1234, "1,234 patches")],
)
def test_a_count_and_its_word_agree(number: int, words: str) -> None:
    assert count(number, "patch", "patches") == words
    assert count(number, "rank") == words.replace("patches", "ranks").replace("patch", "rank")
    assert agree(number, "is", "are") == ("is" if number == 1 else "are")


def test_no_message_counts_one_in_the_plural() -> None:
    package = REPOSITORY / "mpichunk"
    found = {
        (path.relative_to(package).as_posix(), text)
        for path in package.rglob("*.py")
        for text in COUNTED.findall(path.read_text())
    }
    assert found == NEVER_ONE, "use mpichunk.words.count, or say above why it cannot be one"
