"""Single values of a config changed in its text: the rest stays as the user wrote it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.config.edit import edit, render_value
from mpichunk.config.text import parse, render

TEXT = """\
# mine
input: {volume: data/em|zarr3:}   # the image
model:
  backend: pytorch   # or another
  path: net.py:Net
patch:

  # zyx
  shape: [16, 32, 32]
block: {shape: [32, 32, 32]}
compute:
run_dir: x"""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.backend": "openvino"}, TEXT.replace("pytorch ", "openvino ")),
        ({"patch.batch_size": 4}, TEXT.replace("  shape: [16", "  batch_size: 4\n  shape: [16")),
        (
            {"compute.precision": "tf32", "compute.compile": True},
            TEXT.replace("compute:\n", "compute:\n  compile: true\n  precision: tf32\n"),
        ),
        (
            {"block.margin": [1, 2, 3]},
            TEXT.replace("32, 32]}", "32, 32], margin: [1, 2, 3]}"),
        ),
        (
            {"schedule.mode": "static", "schedule.max_attempts": 2},
            TEXT + "\nschedule: {mode: static, max_attempts: 2}\n",
        ),
        (
            {"input.normalize.divide": 2.5},
            TEXT.replace("zarr3:}", "zarr3:, normalize: {divide: 2.5}}"),
        ),
        ({"run_dir": "y"}, TEXT.replace("run_dir: x", "run_dir: y")),
        ({}, TEXT),
    ],
)
def test_only_the_value_changes(changes: dict[str, Any], expected: str) -> None:
    assert edit(TEXT, changes) == expected


@pytest.mark.parametrize(
    "text",
    [
        "model:\n  options:\n    a: 1\n    b: 2\npatch: {shape: [1,\n 2, 3]}\n",
        "model: &m {options: 3}\nblock: 1\n",
        "",
        "# nothing\n",
        "{model: {backend: x}}",
        "---\nmodel:\n- 1\n",
    ],
)
@pytest.mark.parametrize(
    "key", ["model.options", "model.backend", "patch.shape", "patch", "new.a.b"]
)
def test_whatever_the_text_the_values_are_right(text: str, key: str) -> None:
    values = parse(text, "x").values or {}
    changed = parse(edit(text, {key: [7, 8]}), "x").values
    node = changed
    for name in key.split("."):
        node = node[name]
    assert node == [7, 8]
    top = key.partition(".")[0]
    assert {k: v for k, v in changed.items() if k != top} == {
        k: v for k, v in values.items() if k != top
    }


WORDS = st.text(alphabet="abc:#- ,'\"{}[]\n|é", min_size=1, max_size=6)
SECTIONS = st.dictionaries(WORDS, st.one_of(st.integers(), WORDS, st.none(), st.lists(WORDS)))


@given(st.dictionaries(st.sampled_from("abcd"), SECTIONS), st.sampled_from("abcde"), WORDS)
def test_values_of_any_config(values: dict[str, Any], section: str, value: str) -> None:
    found = parse(edit(render(values), {f"{section}.key": value}), "x").values
    assert found == {**values, section: {**(values.get(section) or {}), "key": value}}


def test_values_are_on_one_line() -> None:
    assert render_value(True) == "true"
    assert render_value({"a": [1, "no"], "b": {}}) == "{a: [1, 'no'], b: {}}"
