"""YAML text to values with lines: the core schema, mistakes with their place, round trips, fuzz."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpichunk.config.text import parse, render
from mpichunk.errors import ConfigError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-0", 0),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("none", "none"),
        ("yes", "yes"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("[1, [2, 3]]", [1, [2, 3]]),
        ("{a: 1, 2: b, true: c}", {"a": 1, "2": "b", "true": "c"}),
        ("{<<: 1}", {"<<": 1}),
    ],
)
def test_values_follow_the_core_schema(text: str, value: Any) -> None:
    found = parse(f"key: {text}\n", "c.yaml").values["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a: file://out|zarr3:\nb: 1", {"a": "file://out|zarr3:", "b": 1}),
        ("a: file://my out|zarr3:   # comment\n", {"a": "file://my out|zarr3:"}),
        ("a:\r\n  b: out|n5:\r\n  c: 1\r\n", {"a": {"b": "out|n5:", "c": 1}}),
        ("{a: file://out|zarr3:, b: 1}", {"a": "file://out|zarr3:", "b": 1}),
        ("{a: file://out|zarr3:}", {"a": "file://out|zarr3:"}),
        ("- a.zip|zip:b/|zarr3:\n- c", ["a.zip|zip:b/|zarr3:", "c"]),
        ("file://out|zarr3:", "file://out|zarr3:"),
        ("a: 'file://out|zarr3:'", {"a": "file://out|zarr3:"}),
        ("a: x # y|zarr3:\nb: 1", {"a": "x", "b": 1}),
        ("a|b: 1", {"a|b": 1}),
        ("a: |-\n  x|y:\n  z", {"a": "x|y:\nz"}),
    ],
)
def test_a_tensorstore_url_needs_no_quotes(text: str, values: Any) -> None:
    assert parse(text, "c.yaml").values == values


def test_every_key_has_its_line() -> None:
    text = "# head\na: 1\n\nb:\n  c: [1,\n      2]\n  d: {e: 1,\n      f: 2}\ng:\n- h: 1\n"
    assert parse(text, "c.yaml").lines == {
        "a": 2, "b": 4, "b.c": 5, "b.d": 7, "b.d.e": 7, "b.d.f": 8, "g": 9, "g.0.h": 10,
    }  # fmt: skip


def test_keys_given_twice_are_named_with_their_lines() -> None:
    document = parse("a: {b: 1, b: 2}\nc: 1\nd: 5\nc: {e: 2}\nc: {e: 3}\n", "c.yaml")
    assert [(p.key, p.message) for p in document.problems] == [
        ("a.b", "given 2 times; keep one"),
        ("c", "given 3 times, on lines 2, 4, 5; keep one"),
    ]


END = "; look at indentation, quotes and brackets up to here"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n\tb: 1", "c.yaml:2:1: is indented with a tab; YAML allows spaces only"),
        ("a:\n  b: 1\n\tc: 2", "c.yaml:3:1: is indented with a tab; YAML allows spaces only"),
        ("a: b: c", f"c.yaml:1:5: is not YAML: mapping values are not allowed here{END}"),
        (
            "a: 1\nb: [1\nc: 2",
            "c.yaml:3:2: is not YAML: while parsing a flow sequence, "
            f"expected ',' or ']', but got ':'{END}",
        ),
        (
            "a: 'x",
            "c.yaml:1:6: is not YAML: while scanning a quoted scalar, "
            f"found unexpected end of stream{END}",
        ),
        ("a: *b", f"c.yaml:1:4: is not YAML: found undefined alias 'b'{END}"),
        (
            "--- 1\n--- 2",
            "c.yaml:2:1: is not YAML: expected a single document in the stream, "
            f"but found another document{END}",
        ),
        ("a: 1\n? [b]\n: c", "c.yaml:2:3: a key must be text"),
        ("a: !!set {b}", "c.yaml:1:4: the tag 'tag:yaml.org,2002:set' is not known here"),
        ("a: !!int b", "c.yaml:1:4: 'b' is not of the type 'int'"),
        ("a: 1\nb: \x00", "c.yaml:2: is not a text file: it holds the character '\\x00'"),
        ("a: &b [*b]", "c.yaml: is nested too deeply, or refers to itself"),
        ("[" * 1000, "c.yaml: is nested too deeply, or refers to itself"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "c.yaml")
    assert str(caught.value) == message


def test_an_absurdly_long_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not of the type 'int'"):
        parse("a: " + "9" * 5000, "c.yaml")


@settings(max_examples=60)
@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_what_is_written_reads_back_equal(values: dict[str, Any]) -> None:
    document = parse(render(values), "c.yaml")
    assert document.values == values
    assert document.problems == []


@given(st.text() | st.text("ab:-[]{}|#'\"&*!? \n\t01,", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text, "c.yaml")
    except ConfigError as error:
        assert str(error).startswith("c.yaml:")


@st.composite
def written_mappings(draw: st.DrawFn, indent: int = 0, prefix: str = "") -> list[tuple[str, str]]:
    """Draw lines of nested YAML, each with the dotted key that it gives, or ""."""
    lines: list[tuple[str, str]] = []
    margin = " " * indent
    for name in draw(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=3, unique=True)):
        for filler in draw(st.lists(st.sampled_from(["", "# a: 1", f"{margin}# x"]), max_size=2)):
            lines.append((filler, ""))
        key = prefix + name
        kind = draw(st.sampled_from(["value", "list", "section"])) if indent < 6 else "value"
        if kind == "value":
            lines.append((f"{margin}{name}: {draw(st.integers())}  # {name}", key))
        elif kind == "list":
            lines += [(f"{margin}{name}: [1,", key), (f"{margin}   2]", "")]
        else:
            lines.append((f"{margin}{name}:", key))
            lines += draw(written_mappings(indent + 2, f"{key}."))
    return lines


@settings(max_examples=50)
@given(written_mappings())
def test_lines_are_those_of_the_text(written: list[tuple[str, str]]) -> None:
    document = parse("\n".join(text for text, _ in written), "c.yaml")
    assert document.lines == {key: i for i, (_, key) in enumerate(written, start=1) if key}
    assert document.problems == []
