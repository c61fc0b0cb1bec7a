"""Which devices the environment leaves to a process, and who of a node takes which."""

import itertools
import random
from types import SimpleNamespace

import pytest

import mpichunk.backends.devices.probing as devices
from mpichunk.backends.devices.matching import match
from mpichunk.backends.devices.visibility import listed_name, visible_devices

VISIBLE = [
    ({}, "all"),
    ({"CUDA_VISIBLE_DEVICES": "1"}, "CUDA_VISIBLE_DEVICES=1"),
    ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES=(none)"),
    ({"ROCR_VISIBLE_DEVICES": "2,3"}, "ROCR_VISIBLE_DEVICES=2,3"),
    # Slurm sets several to the same.
    ({"CUDA_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),
    (
        {"ROCR_VISIBLE_DEVICES": "3", "HIP_VISIBLE_DEVICES": "0"},
        "ROCR_VISIBLE_DEVICES=3 HIP_VISIBLE_DEVICES=0",
    ),
    ({"ZE_AFFINITY_MASK": "0.1"}, "ZE_AFFINITY_MASK=0.1"),
    ({"CUDA_VISIBLE_DEVICES": "MIG-5c0f,GPU-77"}, "CUDA_VISIBLE_DEVICES=MIG-5c0f,GPU-77"),
]


@pytest.mark.parametrize(("environ", "expected"), VISIBLE)
def test_visible_devices(environ, expected):
    assert visible_devices(environ) == expected


LISTED = [
    ({}, 0, None),
    ({"CUDA_VISIBLE_DEVICES": ""}, 0, None),
    ({"CUDA_VISIBLE_DEVICES": "3,1"}, 1, "1"),
    ({"CUDA_VISIBLE_DEVICES": "3,1"}, 2, None),
    ({"CUDA_VISIBLE_DEVICES": "MIG-a, MIG-b"}, 1, "MIG-b"),
    ({"ROCR_VISIBLE_DEVICES": "6"}, 0, "6"),
]


@pytest.mark.parametrize(("environ", "index", "expected"), LISTED)
def test_listed_name(environ, index, expected):
    assert listed_name(environ, index) == expected


def physical_id(environ, index=0, **properties):
    module = SimpleNamespace(get_device_properties=lambda _: SimpleNamespace(**properties))
    return devices._physical_id(SimpleNamespace(cuda=module), "cuda", index, environ)


def test_instances_of_one_device_are_different_devices():
    ids = [
        physical_id({"CUDA_VISIBLE_DEVICES": name}, uuid="GPU-parent", pci_bus_id=59)
        for name in ("MIG-5c0f", "MIG-77aa", "MIG-GPU-1b2c/3/0")
    ]
    assert ids == ["MIG-5c0f", "MIG-77aa", "MIG-GPU-1b2c/3/0"]


def test_a_number_names_a_device_only_where_nothing_better_does():
    environ = {"ROCR_VISIBLE_DEVICES": "6,7"}
    assert physical_id(environ, 1, uuid="ab-1") == "ab-1"
    assert physical_id(environ, 1, uuid="00-0") == "cuda:7"
    assert physical_id({}, 1) == "cuda:1"


MATCHES = [
    ([], []),
    (["abcd"] * 4, ["a", "b", "c", "d"]),
    (["a", "b", "c"], ["a", "b", "c"]),
    # Socket by socket, ranks dealt out in turn.
    (["ab", "cd", "ab", "cd"], ["a", "c", "b", "d"]),
    # Who may choose makes room.
    (["ab", "a"], ["b", "a"]),
    (["ab", "bc", "a", "b"], ["b", "c", "a", None]),
    (["", "a"], [None, "a"]),
    (["a", "a"], ["a", None]),
]


@pytest.mark.parametrize(("choices", "expected"), MATCHES)
def test_match(choices, expected):
    assert match(choices) == expected


@pytest.mark.parametrize("seed", range(200))
def test_match_gives_as_many_as_possible_one_each(seed):
    draw = random.Random(seed)
    choices = [draw.sample("abcde", draw.randint(0, 4)) for _ in range(draw.randint(0, 5))]
    found = match(choices)
    given = [name for name in found if name is not None]
    assert len(set(given)) == len(given)
    assert all(name is None or name in names for name, names in zip(found, choices, strict=True))
    ways = itertools.product(*([None, *names] for names in choices))
    most = max(
        len(way) - way.count(None)
        for way in ways
        if len({name for name in way if name}) == len(way) - way.count(None)
    )
    assert len(given) == most
