"""The config's values: defaults, rules that join values, what has no effect."""

import pickle
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mpichunk.config.checks import check
from mpichunk.config.rules import default_chunk_shape, find_problems, find_warnings
from mpichunk.config.schema import Config, Section, flatten
from mpichunk.errors import Problem

Values = dict[str, Any]

MINIMAL: Values = {
    "input": {"volume": "/data/em"},
    "model": {"backend": "identity"},
    "patch": {"shape": [20, 256, 256]},
    "block": {"shape": [128, 1152, 1152]},
    "output": {"volume": "/out/pred.zarr"},
    "run_dir": "/runs/pred",
}


def changed(changes: Values) -> Values:
    """Return the minimal config with these dotted keys set."""
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in MINIMAL.items()}
    for key, value in changes.items():
        *parents, name = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return values


def config_with(changes: Values) -> Config:
    return Config.model_validate(changed(changes))


def warnings_of(config: Config) -> list[str]:
    return [f"{p.key}: {p.message}" for p in find_warnings(flatten(config))]


def problems_of(values: Values) -> list[str]:
    result = check(values)
    assert isinstance(result, list)
    return [f"{problem.key}: {problem.message}" for problem in result]


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


RULES: list[tuple[Values, list[str]]] = [
    (
        {"patch.overlap": [4, 64, 300]},
        ["patch.overlap: (4, 64, 300) must be smaller than the output patch (20, 256, 256)"],
    ),
    (
        {"patch.overlap": [4, 64, 236], "patch.crop": [1, 10, 10]},
        ["patch.overlap: (4, 64, 236) must be smaller than the output patch (18, 236, 236)"],
    ),
    (
        {"patch.crop": [0, 0, 128]},
        [
            "patch.crop: (0, 0, 128) cut off each side leaves nothing of the patch (20, 256, 256); "
            "it must be less than half of it on every axis"
        ],
    ),
    (
        {"block.margin": [2, 257, 32]},
        ["block.margin: (2, 257, 32) must not be larger than the output patch (20, 256, 256)"],
    ),
    (
        {"block.shape": [128, 1000, 20], "output.chunk_shape": [64, 64, 64]},
        [
            "block.shape: (128, 1000, 20) must be a multiple of the output's chunk (64, 64, 64), "
            "which two blocks must not share; the nearest is (128, 1024, 64)"
        ],
    ),
    (
        {"output.shard_shape": [128, 512, 512]},
        [
            "block.shape: (128, 1152, 1152) must be a multiple of the output's shard "
            "(128, 512, 512), which two blocks must not share; the nearest is (128, 1024, 1024)"
        ],
    ),
    (
        {"output.shard_shape": [64, 96, 64], "output.chunk_shape": [64, 64, 64]},
        ["output.shard_shape: (64, 96, 64) must be a multiple of the chunk (64, 64, 64)"],
    ),
    (
        {"output.shard_shape": [64, 96, 64]},
        [
            "output.shard_shape: (64, 96, 64) must be a multiple of the chunk (64, 64, 64), which "
            "follows from block.shape: give output.chunk_shape too"
        ],
    ),
    (
        {"output.shard_shape": [64, 64, 64], "output.volume": "precomputed:///out"},
        [
            "output.shard_shape: (64, 64, 64) needs an output in zarr3, and this one is "
            "precomputed; take it out or write zarr3"
        ],
    ),
    (
        {"output.dtype": "float16", "output.volume": "precomputed:///out"},
        ["output.dtype: 'float16' cannot be stored as precomputed; use 'float32', or write zarr3"],
    ),
    (
        {"output.volume": "synthetic://membranes?shape=64,64,64"},
        [
            "output.volume: 'synthetic://membranes?shape=64,64,64' can only be read; name a path "
            "or a store that can be written"
        ],
    ),
    (
        {"output.volume": "file:///data/em|zarr3:"},
        [
            "output.volume: '/data/em' is the input too, which would be overwritten; "
            "write somewhere else"
        ],
    ),
    (
        {"mask.volume": "/out/pred.zarr"},
        [
            "output.volume: '/out/pred.zarr' is the mask too, which would be overwritten; "
            "write somewhere else"
        ],
    ),
    (
        {"roi": {"start": [0, 0, 9], "stop": [8, 8, 9]}},
        ["roi.stop: (8, 8, 9) must be greater than roi.start (0, 0, 9) on every axis"],
    ),
    (
        {"input.normalize": {"clip": [1, 1]}},
        ["input.normalize.clip: (1.0, 1.0) must be two numbers, the lower first"],
    ),
    (
        {"model.backend": "pytorch"},
        [
            "model.path: missing; the pytorch backend needs a network, e.g. `path: net.pt2` "
            "(torch.export), `path: net.pt` (TorchScript) or `path: nets.py:UNet`"
        ],
    ),
    (
        {"model.backend": "openvino"},
        [
            "model.path: missing; the openvino backend needs a network, "
            "e.g. `path: net.onnx`, `path: net.xml`, or one that torch can load"
        ],
    ),
    (
        {"model.backend": "onnxruntime", "model.path": "a.onnx", "model.arguments": {"a": 1}},
        [
            "model.arguments: a: only a network given as code (file.py:Name) takes arguments, "
            "not 'a.onnx'"
        ],
    ),
    (
        {"model.backend": "onnxruntime", "model.path": "nets.py:UNet"},
        [
            "model.path: 'nets.py:UNet' is code, which the onnxruntime backend does not take; "
            "it takes `path: net.onnx`, or set model.backend: pytorch"
        ],
    ),
    (
        {"model.path": "nets.py"},
        ["model.path: 'nets.py' does not name the network in the file; write nets.py:Name"],
    ),
    (
        {
            "model.backend": "pytorch",
            "model.path": "net.pt",
            "model.weights": "w.pt",
            "model.arguments": {"width": 1, "depth": 2},
        },
        [
            "model.arguments: width, depth: only a network given as code (file.py:Name) "
            "takes arguments, not 'net.pt'",
        ],
    ),
]


@pytest.mark.parametrize(("changes", "messages"), RULES, ids=lambda value: str(value)[:60])
def test_rules_that_join_values(changes: Values, messages: list[str]) -> None:
    assert problems_of(changed(changes)) == messages


HINTS: list[tuple[Values, list[str]]] = [
    (
        {"block.stitch": "seamless", "block.margin": [2, 32, 32]},
        [
            "block.margin: (2, 32, 32) has no effect with `stitch: seamless`, which has no margin",
        ],
    ),
    (
        {"output.domain": "roi"},
        ["output.domain: 'roi' has no effect without a `roi`: the output covers the whole input"],
    ),
    ({"output.domain": "roi", "roi": {"start": [0, 0, 0], "stop": [1, 1, 1]}}, []),
    (
        {"input.dataset": "raw", "input.volume": "precomputed:///data/em"},
        [
            "input.dataset: 'raw' has no effect: the volume is precomputed, "
            "and only HDF5 files hold datasets"
        ],
    ),
    ({"input.dataset": "raw", "input.volume": "/data/em.h5"}, []),
    (
        {"mask.dataset": "m", "mask.volume": "/data/mask.zarr"},
        ["mask.dataset: 'm' has no effect: the volume is zarr3, and only HDF5 files hold datasets"],
    ),
    (
        {"model.path": "net.pt", "model.weights": "w.pt", "model.arguments": {"a": 1}},
        [
            "model.path: has no effect with `backend: identity`",
            "model.weights: has no effect with `backend: identity`",
            "model.arguments: has no effect with `backend: identity`",
        ],
    ),
    (
        {"model.activation": "softmax"},
        [
            "model.activation: 'softmax' over one channel is 1 everywhere; "
            "did you mean 'sigmoid', or more channels?"
        ],
    ),
    (
        {"compute.device": "cuda"},
        [
            "compute.device: 'cuda' has no effect with `backend: identity`, which runs on the CPU",
        ],
    ),
    (
        {
            "model.backend": "openvino",
            "model.path": "n.onnx",
            "model.weights": "w.pt",
            "compute.device": "cuda",
        },
        [
            "model.weights: has no effect: 'n.onnx' brings its own weights",
            "compute.device: 'cuda' has no effect with `backend: openvino`, which runs on the CPU",
        ],
    ),
    (
        {"model.backend": "pznet", "model.path": "net", "model.options": {"a": 1}},
        ["model.options: has no effect with `backend: pznet`"],
    ),
    ({"model.backend": "openvino", "model.path": "n.py:Net", "model.weights": "w.pt"}, []),
    (
        {"compute.device": "cpu", "compute.share_device": True},
        ["compute.share_device: has no effect with `device: cpu`"],
    ),
]


@pytest.mark.parametrize(("changes", "messages"), HINTS, ids=lambda value: str(value)[:60])
def test_values_without_effect_are_warned_about(changes: Values, messages: list[str]) -> None:
    config = config_with(changes)
    assert warnings_of(config) == messages
    assert warnings_of(config.with_defaults()) == messages


def test_rules_are_applied_to_what_is_valid_whatever_else_is_wrong() -> None:
    values = changed(
        {
            "patch.window": "gauss",
            "patch.overlap": [4, 64, 300],
            "block.shape": [128, 1000, 1152],
            "block.stitch": 5,
            "output.chunk_shape": [64, 64, 64],
            "output.bogus": 1,
            "roi": {"start": [0, 0, 0], "stop": [0, 1, 1], "step": 3},
        }
    )
    del values["model"]
    assert {line.partition(":")[0] for line in problems_of(values)} == {
        "patch.window", "patch.overlap", "block.shape", "block.stitch", "output.bogus",
        "roi.step", "roi.stop", "model",
    }  # fmt: skip


def test_a_rule_that_reads_a_wrong_value_is_left_out() -> None:
    assert [
        line.partition(":")[0]
        for line in problems_of(changed({"patch.crop": 99, "patch.overlap": [4, 64, 300]}))
    ] == ["patch.crop"]


def test_problems_need_no_more_than_the_values_they_read() -> None:
    found = find_problems({"roi.start": (1, 1, 1), "roi.stop": (1, 1, 1)})
    message = "(1, 1, 1) must be greater than roi.start (1, 1, 1) on every axis"
    assert found == [Problem(key="roi.stop", message=message)]


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
