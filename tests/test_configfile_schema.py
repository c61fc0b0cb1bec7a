"""Config files written and read again, and the schema that an editor is told."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpichunk.config.file import dump_config, json_schema, load_config
from mpichunk.config.schema import Config
from mpichunk.config.text import parse, render
from tests.minimalconfig import GOOD, good_with

# ---- Round trip ------------------------------------------------------------------------------

NAMES = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12
)
TRIPLES = st.tuples(*[st.integers(1, 40)] * 3)
POSITIVE = st.floats(1e-6, 1e6)


@st.composite
def config_values(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the values of a valid config, lists where YAML has lists."""

    def below(shape: list[int]) -> list[int]:
        return [draw(st.integers(0, n)) for n in shape]

    def times(shape: list[int]) -> list[int]:
        return [n * draw(st.integers(1, 3)) for n in shape]

    patch, crop = list(draw(TRIPLES)), list(draw(TRIPLES))
    chunk = list(draw(TRIPLES))
    shard = draw(st.none() | st.just(times(chunk)))
    start = [draw(st.integers(-99, 99)) for _ in range(3)]
    values: dict[str, Any] = {
        "input": {
            "volume": f"/data/{draw(NAMES)}",
            "dataset": draw(st.none() | NAMES),
            "voxel_size": draw(st.none() | st.lists(POSITIVE, min_size=3, max_size=3)),
            "normalize": draw(st.none() | st.fixed_dictionaries({"divide": POSITIVE})),
        },
        "roi": draw(
            st.none()
            | st.just({"start": start, "stop": [a + n for a, n in zip(start, patch, strict=True)]})
        ),
        "model": {
            "backend": "pytorch",
            "path": draw(st.sampled_from(["net.pt", "nets.py:Net", "my.nets:Net"])),
            "out_channels": draw(st.integers(1, 4)),
        },
        "patch": {
            "shape": [n + 2 * c for n, c in zip(patch, crop, strict=True)],
            "crop": crop,
            "overlap": draw(st.none() | st.just(below([n - 1 for n in patch]))),
        },
        "block": {
            "shape": times(shard or chunk),
            "stitch": draw(st.sampled_from(["crop", "seamless"])),
            "margin": draw(st.none() | st.just(below(patch))),
        },
        "output": {"volume": "out.zarr", "chunk_shape": chunk, "shard_shape": shard},
    }
    if values["model"]["path"] != "net.pt":
        values["model"]["arguments"] = draw(
            st.dictionaries(NAMES, st.integers() | NAMES | st.lists(POSITIVE, max_size=2))
        )
    return values


@settings(max_examples=60)
@given(values=config_values())
def test_dumping_and_loading_changes_nothing(
    values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    first, second = folder / "first.yaml", folder / "second.yaml"
    first.write_bytes(render(values).encode())
    config = load_config(first).config
    assert config == Config.model_validate(config.model_dump())
    second.write_bytes(dump_config(config).encode())
    assert load_config(second).config == config


# ---- Schema ----------------------------------------------------------------------------------


def test_schema_tells_an_editor_what_the_loader_tells() -> None:
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(parse(GOOD, "").values)
    assert not validator.is_valid(parse(GOOD + "bogus: 1\n", "").values)
    assert not validator.is_valid(parse(good_with("256]", "256, 1]"), "").values)
    assert not validator.is_valid(parse(good_with("  volume: data/em\n", "  mip: 0\n"), "").values)
    assert schema["required"] == ["input", "model", "patch", "block", "output"]


def test_schema_documents_every_key_and_closes_every_section() -> None:
    schema = json.loads(json_schema())
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for field in section["properties"].values():
            assert "description" in field or "description" in schema["$defs"][field["$ref"][8:]]
