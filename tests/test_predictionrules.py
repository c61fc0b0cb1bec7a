"""What a config may ask of augmentation and reductions, and what has no effect."""

from typing import Any

import pytest

from tests.minimalconfig import changed, config_with, problems_of, warnings_of

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"model.augment": "flip_z"}, "model.augment: 'flip_z' must be a list of some of `flip_z`"),
    ({"model.augment": ["flip_t"]}, "model.augment: ('flip_t') must be a list of some of"),
    (
        {"model.augment": ["rot90"], "patch.shape": [16, 64, 32]},
        "model.augment: `rot90` exchanges y and x, so they must be equal, which they are not in "
        "patch.shape (16, 64, 32)",
    ),
    (
        {"model.augment": ["rot90"], "patch.crop": [0, 4, 2]},
        "model.augment: `rot90` exchanges y and x, so they must be equal, which they are not in "
        "patch.crop (0, 4, 2)",
    ),
    (
        {"model.out_channels": 3, "model.affinity_channels": [1, 2, 3]},
        "model.affinity_channels: there is no channel 3: model.out_channels is 3, so the last "
        "channel is 2",
    ),
    (
        {"model.out_channels": 3, "model.affinity_channels": [0, 1, 1]},
        "model.affinity_channels: (0, 1, 1) names a channel twice",
    ),
    (
        {"model.out_channels": 3, "model.affinity_channels": {0: [0, 0, 0]}},
        "model.affinity_channels: the offset (0, 0, 0) joins a voxel to itself",
    ),
    (
        {"model.affinity_channels": {"a": [0, 0, 1]}},
        "model.affinity_channels: {a: (0, 0, 1)} must be three channels zyx",
    ),
    (
        {
            "model.out_channels": 2,
            "model.affinity_channels": {1: [0, -1, 0]},
            "model.augment": ["rot90"],
        },
        "model.augment: ['rot90'] turns the offset [0, -1, 0] of channel 1 into one that the "
        "network does not predict: no channel has the offset [0, 0, ",
    ),
    (
        {
            "model.out_channels": 4,
            "model.affinity_channels": {
                0: [0, -1, 0],
                1: [0, 1, 0],
                2: [0, 0, -1],
                3: [0, 0, -1],
            },
            "model.augment": ["rot90"],
        },
        "model.augment: `rot90` cannot tell the channels 0 and 1 apart",
    ),
    (
        {"model.out_channels": 2, "output.channels": [0, 2]},
        "output.channels: there is no channel 2",
    ),
    ({"output.channels": []}, "output.channels: () must be a list of channels"),
    (
        {"model.out_channels": 2, "output.channels": [1, 1]},
        "output.channels: (1, 1) names a channel twice",
    ),
    (
        {"model.out_channels": 3, "output.gate": {"channel": 3, "below": 0.2}},
        "output.gate.channel: there is no channel 3",
    ),
    (
        {"output.gate": {"channel": 0, "below": 0.2}},
        "output.gate.channel: the network's only channel is that of the gate",
    ),
    (
        {"output.gate": {"channel": 0}, "model.out_channels": 2},
        "output.gate.below: missing. The others are kept where",
    ),
    ({"output.threshold": -0.5}, "output.threshold: -0.5 must be a number, at least 0"),
    (
        {"output.threshold": 0.5, "output.reduce": "vote", "model.out_channels": 2},
        "output.threshold: 0.5 cannot be applied to the labels of `reduce: vote`",
    ),
    (
        {"output.reduce": "max", "model.out_channels": 2},
        "output.reduce: 'max' must be `argmax` or `vote`",
    ),
    (
        {"output.reduce": "vote", "output.dtype": "int8", "model.out_channels": 128},
        "output.dtype: 'int8' ends at 127, but labels go up to 128; use 'uint16'",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), MISTAKES)
def test_mistakes_are_told_in_one_message(changes: dict[str, Any], expected: str) -> None:
    (problem,) = problems_of(changed(changes))
    assert problem.startswith(expected)


def test_labels_that_just_fit() -> None:
    labels = {"output.reduce": "argmax", "output.dtype": "int8", "model.out_channels": 128}
    assert config_with(labels).num_written_channels == 1
    assert config_with(labels | {"output.dtype": "float32"}).output.dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model.augment": ["flip_z"], "model.out_channels": 3},
            "model.augment: every channel is averaged as it lies; if the network predicts "
            "affinities, name their channels in model.affinity_channels, else write "
            "`affinity_channels: {}`",
        ),
        (
            {"model.affinity_channels": [0, 1, 2], "model.out_channels": 3},
            "model.affinity_channels: has no effect without `augment`",
        ),
        (
            {"output.reduce": "argmax"},
            "output.reduce: 'argmax' of one channel is the same everywhere; did you mean "
            "`threshold`?",
        ),
    ],
)
def test_values_without_effect_are_told(changes: dict[str, Any], expected: str) -> None:
    assert warnings_of(config_with(changes)) == [expected]


def test_silenced_warning() -> None:
    changes = {"model.augment": ["flip_z"], "model.out_channels": 3}
    for channels in ({}, [0, 1, 2]):
        assert warnings_of(config_with(changes | {"model.affinity_channels": channels})) == []
