"""The config's values: defaults, what is accepted, and every key by itself."""

import pickle
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mpichunk.config.checks import check
from mpichunk.config.rules import default_chunk_shape
from mpichunk.config.schema import Config, Section, flatten
from tests.minimalconfig import MINIMAL, Values, changed, config_with, problems_of, warnings_of


def test_defaults() -> None:
    config = config_with({})
    assert config.output_patch_shape == (20, 256, 256)
    assert config.overlap == (5, 64, 64)
    assert config.margin == (2, 32, 32)
    assert config.chunk_shape == (64, 64, 64)
    assert config.write_unit == (64, 64, 64)
    assert (config.roi, config.mask) == (None, None)
    assert (config.model.out_channels, config.output.dtype) == (1, "float32")


def test_defaults_follow_the_output_patch() -> None:
    config = config_with({"patch.crop": [2, 20, 20], "block.shape": [97, 130, 6]})
    assert config.output_patch_shape == (16, 216, 216)
    assert config.overlap == (4, 54, 54)
    assert config.margin == (2, 27, 27)
    assert config.chunk_shape == (1, 26, 6)


@given(st.tuples(*[st.integers(1, 5000)] * 3))
def test_default_chunk_is_the_largest_divisor_up_to_64(shape: tuple[int, int, int]) -> None:
    chunk = default_chunk_shape(shape)
    for n, c in zip(shape, chunk, strict=True):
        assert c == max(d for d in range(1, 65) if n % d == 0)


def test_write_unit_is_the_shard_where_there_is_one() -> None:
    config = config_with({"output.shard_shape": [128, 576, 576]})
    assert config.write_unit == (128, 576, 576)


def test_with_defaults_writes_them_out_and_says_so_only_once() -> None:
    short = config_with({}).with_defaults()
    assert short.patch.overlap == (5, 64, 64)
    assert short.block.margin == (2, 32, 32)
    assert short.output.chunk_shape == (64, 64, 64)
    spelled = {
        "patch.overlap": [5, 64, 64],
        "block.margin": [2, 32, 32],
        "output.chunk_shape": [64, 64, 64],
    }
    assert config_with(spelled).with_defaults() == short
    assert short.with_defaults() == short


def test_with_defaults_gives_seamless_no_margin() -> None:
    config = config_with({"block.stitch": "seamless"}).with_defaults()
    assert config.block.margin is None
    assert warnings_of(config) == []


def test_config_is_frozen_and_travels() -> None:
    config = config_with({"roi": {"start": [0, -5, 0], "stop": [1, 1, 1]}})
    with pytest.raises(ValidationError):
        config.run_dir = "elsewhere"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_built_in_python_the_rules_hold_too() -> None:
    with pytest.raises(ValidationError, match=r"patch\.overlap: .* must be smaller"):
        config_with({"patch.overlap": [4, 64, 300]})


ACCEPTED: list[Values] = [
    {"patch.overlap": [19, 255, 255]},
    {"patch.overlap": [0, 0, 0], "block.margin": [0, 0, 0]},
    {"block.margin": [20, 256, 256]},
    {"block.margin": [99, 999, 999], "block.stitch": "seamless"},
    {"patch.crop": [9, 127, 127], "patch.overlap": [0, 0, 0]},
    {"block.shape": [97, 31, 1]},
    {"input.voxel_offset": [-5, 0, 3], "input.voxel_size": [40, 4.5, 4]},
    {"input.normalize": {}},
    {"input.normalize": {"clip": [-1, 1.5], "subtract": -3, "divide": 0.5}},
    {"input.volume": {"driver": "zarr3", "kvstore": "file:///data/em"}},
    {"roi": {"start": [-9, -9, -9], "stop": [-8, -8, -8]}},
    {"compute": None, "schedule": None, "mask": None, "roi": None},
    {"compute.device": "cuda:1"},
    {"model.backend": "pytorch", "model.path": "net.pt"},
    {"model.backend": "pytorch", "model.path": "nets.py:Net", "model.weights": "w.safetensors"},
    {"model.backend": "pytorch", "model.path": "my.nets:Net", "model.arguments": {"width": 16}},
    {"output.dtype": "float16", "output.volume": "file:///out|zarr3:"},
    {"output.shard_shape": [64, 128, 128], "output.volume": "/out/some_directory"},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_accepted(changes: Values) -> None:
    config_with(changes)


def all_fields(section: type[Section], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    fields = []
    for name, field in section.model_fields.items():
        fields.append((prefix + name, field))
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                fields += all_fields(candidate, f"{prefix}{name}.")
    return fields


FIELDS = dict(all_fields(Config))


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_is_documented_and_refuses_nonsense_in_plain_words(key: str) -> None:
    assert (FIELDS[key].description or "").endswith(".")
    nonsense: Any = [object()] if key.count(".") or key == "run_dir" else 5
    lines = problems_of(changed({key: nonsense}))
    assert any(line.startswith(f"{key}: ") and " must be " in line for line in lines)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
JARGON = ("pydantic", "Input should", "validation", "Field required", "[type=", "int_type", "str |")


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text("abc.", min_size=1), JUNK))
def test_any_values_are_accepted_or_refused_in_plain_words(changes: Values) -> None:
    values = dict(MINIMAL)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        known = values.get(section)
        values[section] = {**known, name: value} if name and isinstance(known, dict) else value
    result = check(values)
    if isinstance(result, Config):
        assert flatten(result)["input.volume"]
    else:
        assert result
        shown = " ".join(problem.message for problem in result)
        assert not any(word in shown for word in JARGON)
