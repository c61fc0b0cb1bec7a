"""Rules that join values of a config, and what has no effect."""

import pytest

from mpichunk.config.rules import find_problems
from mpichunk.errors import Problem
from tests.minimalconfig import Values, changed, config_with, problems_of, warnings_of

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
            "output.shard_shape: (64, 64, 64) requires a zarr3 output, but this one is "
            "precomputed; remove it or write zarr3"
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
