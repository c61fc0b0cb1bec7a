"""Whole runs, from a file to a file, against the brute-force reference."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

import mpichunk.nets
from mpichunk.config.file import load_config
from mpichunk.config.schema import Config
from mpichunk.geometry.box import Box
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.rundir import journal
from mpichunk.verbs.run import run_on
from mpichunk.volume import open_input
from mpichunk.volume.synthetic import parse_synthetic
from tests.endtoend import start_lines
from tests.metrics import auc
from tests.reference import Reference, ReferenceMask, reference
from tests.smallrun import NET

SHAPE = (21, 30, 37)
OFFSET = (-7, 100, 3)


def write_volume(path: Path, volume: np.ndarray, offset: tuple[int, ...] = OFFSET) -> None:
    """Store a volume as HDF5, in chunks of an odd shape."""
    chunk_shape = [min(n, most) for n, most in zip(volume.shape[-3:], (8, 16, 16), strict=True)]
    with h5py.File(path, "w") as file:
        data = file.create_dataset("raw", data=volume, chunks=(*volume.shape[:-3], *chunk_shape))
        data.attrs["voxel_offset"] = offset


def texture(shape: tuple[int, ...], dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return random.random(shape).astype(dtype)
    return random.integers(0, np.iinfo(dtype).max, shape, endpoint=True, dtype=dtype)


class Case:
    """A folder with a volume and a config, which can be run and compared."""

    def __init__(self, folder: Path, volume: np.ndarray, offset: tuple[int, ...] = OFFSET) -> None:
        self.folder = folder
        self.volume_czyx = volume if volume.ndim == 4 else volume[None]
        self.domain = Box.from_shape(offset, self.volume_czyx.shape[1:])
        write_volume(folder / "raw.h5", volume, offset)
        (folder / "net.py").write_text(NET)

    def run(self, **sections: dict[str, Any]) -> Config:
        """Run a config made of these sections over defaults; return it."""
        config: dict[str, Any] = {
            "input": {"volume": "raw.h5"},
            "model": {"backend": "identity"},
            "patch": {"shape": [8, 12, 12], "overlap": [2, 4, 4]},
            "block": {"shape": [8, 16, 16]},
            "output": {"volume": "out.zarr", "chunk_shape": [4, 8, 8]},
            "compute": {"device": "cpu", "threads": 1},
        }
        for name, section in sections.items():
            config[name] = config.get(name, {}) | section
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        assert run_on(SerialCommunicator(), path) == 0
        return load_config(path).config

    def output(self, config: Config) -> np.ndarray:
        """Return what was stored, (c, z, y, x)."""
        with open_input(config.output.volume) as reader:
            return np.asarray(reader.read(reader.info.domain).result())

    def num_patches(self, config: Config) -> int:
        """Return the patches that ran, by the journal."""
        lines = (Path(config.run_dir) / journal.NAME).read_text().splitlines()
        return sum(json.loads(line).get("num_patches", 0) for line in lines)

    def reference(self, config: Config, **more: Any) -> Reference:
        """Return what the run should have stored."""
        return reference(self.volume_czyx, self.domain, net_of(config), config, **more)


def net_of(config: Config) -> Any:
    """Return the network of a config as a function of one patch."""
    if config.model.backend == "identity":
        number = config.model.out_channels

        def repeat(patch_czyx: np.ndarray) -> np.ndarray:
            return patch_czyx[np.arange(number) % len(patch_czyx)]

        return repeat
    import torch

    names: dict[str, Any] = {}
    exec(NET, names)
    module = names["Net"](**config.model.arguments).eval().double()

    def forward(patch_czyx: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            batch = torch.from_numpy(np.ascontiguousarray(patch_czyx, dtype=np.float64))
            return module(batch[None])[0].numpy()

    return forward


TORCH = {"backend": "pytorch", "path": "net.py:Net", "out_channels": 2, "activation": "sigmoid"}
ROI = {"start": [-5, 103, 11], "stop": [9, 122, 39]}


@pytest.mark.parametrize("stitch", ["crop", "seamless"])
@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"patch": {"window": "bump"}}, id="bump"),
        pytest.param({"patch": {"window": "gaussian", "batch_size": 3}}, id="gaussian"),
        pytest.param({"patch": {"window": "hann", "overlap": [3, 5, 7]}}, id="hann"),
        pytest.param({"patch": {"window": "uniform", "overlap": [0, 0, 0]}}, id="uniform"),
        pytest.param({"patch": {"crop": [1, 2, 3]}, "input": {"pad": "edge"}}, id="crop"),
        pytest.param({"patch": {"crop": [2, 2, 1]}, "input": {"pad": "zero"}}, id="zero"),
        pytest.param({"roi": ROI}, id="roi"),
        pytest.param({"roi": ROI, "output": {"domain": "roi"}}, id="roi-domain"),
        pytest.param({"patch": {"shape": [30, 40, 50], "overlap": [9, 9, 9]}}, id="small-volume"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_run_is_the_reference(tmp_path, sections, stitch, dtype):
    case = Case(tmp_path, texture(SHAPE))
    sections = {name: dict(section) for name, section in sections.items()}
    sections["model"] = TORCH
    sections["block"] = {"stitch": stitch}
    sections.setdefault("output", {})["dtype"] = dtype
    config = case.run(**sections)
    expected, found = case.reference(config), case.output(config)
    assert found.shape == expected.output_czyx.shape
    if dtype == "float32":
        np.testing.assert_allclose(found, expected.values_czyx, rtol=0, atol=1e-5)
    else:
        # Rounding may fall to the other side of a half.
        assert np.abs(found.astype(int) - expected.output_czyx).max() <= 1
    assert case.num_patches(config) == expected.num_patches


KERNELS = "channels_last", "fold_batch_norm"
ALL = "compile", *KERNELS


def largest_difference(folder: Path, kernels: Sequence[str], batch_size: int) -> float:
    """Return how far a run is from the reference, of values in [0, 1], its patches turned.

    `kernels` in the order of `Kernels`.
    """
    case = Case(folder, texture(SHAPE))
    model = TORCH | {"arguments": {"norm": True}, "augment": ["flip_z", "flip_x"]}
    config = case.run(
        model=model,
        patch={"batch_size": batch_size},
        output={"dtype": "float32"},
        compute=dict.fromkeys(kernels, True),
    )
    (start,) = start_lines(Path(config.run_dir))
    assert start["engine"]["kernels"] == list(kernels), "in effect"
    net, turns = net_of(config), list(product([1, -1], [1, -1]))

    def turned(patch_czyx: np.ndarray) -> np.ndarray:
        """Return what gives the mean of all turns once it is activated."""
        found = []
        for z, x in turns:
            probability = 1 / (1 + np.exp(-net(patch_czyx[:, ::z, :, ::x])))
            found.append(probability[:, ::z, :, ::x])
        mean = np.mean(found, axis=0)
        return np.log(mean / (1 - mean))

    expected = reference(case.volume_czyx, case.domain, turned, config)
    return float(np.abs(case.output(config) - expected.values_czyx).max())


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kernels", [(), *((name,) for name in KERNELS), KERNELS])
def test_a_run_is_the_reference_however_the_network_runs(tmp_path, kernels, batch_size):
    assert largest_difference(tmp_path, kernels, batch_size) < 1e-6


COMPILED = """
import sys
from pathlib import Path
from tests.test_run_reference import ALL, largest_difference
for kernels, batch_size in (("compile",), 1), (ALL, 3):
    folder = Path(sys.argv[1], str(batch_size))
    folder.mkdir()
    print(largest_difference(folder, kernels, batch_size))
"""


@pytest.mark.slow
def test_a_compiled_run_is_the_reference(tmp_path, python, inductor):
    # In a process of its own, where nothing was compiled before; plain, then with all kernels.
    done = python("-c", COMPILED, tmp_path, env=inductor)
    assert done.returncode == 0, done.stderr
    differences = [float(line) for line in done.stdout.splitlines()]
    assert len(differences) == 2 and max(differences) < 1e-6


@pytest.mark.parametrize("stitch", ["crop", "seamless"])
def test_a_valid_net_and_two_input_channels(tmp_path, stitch):
    case = Case(tmp_path, texture((2, *SHAPE), np.uint16))
    model = TORCH | {"arguments": {"same": False, "channels": 2}}
    patch = {"shape": [12, 16, 16], "crop": [2, 2, 2], "overlap": [2, 4, 4]}
    config = case.run(model=model, patch=patch, block={"stitch": stitch})
    expected = case.reference(config)
    np.testing.assert_allclose(case.output(config), expected.values_czyx, rtol=0, atol=1e-5)


def test_softmax_and_normalisation(tmp_path):
    case = Case(tmp_path, texture(SHAPE, np.uint16))
    normalize = {"subtract": 30000.0, "divide": 9000.0, "clip": [1000, 60000]}
    config = case.run(model=TORCH | {"activation": "softmax"}, input={"normalize": normalize})
    expected = case.reference(config)
    np.testing.assert_allclose(case.output(config), expected.values_czyx, rtol=0, atol=1e-5)


def test_the_shipped_network_finds_the_membranes_of_the_synthetic_volume(tmp_path):
    nets = Path(mpichunk.nets.__file__).parent
    volume = "synthetic://membranes?shape=32,128,128&seed=7"
    config = {
        "input": {"volume": volume},
        "model": {
            "backend": "pytorch",
            "path": f"{nets}/em_affinity_resunet.py:EmAffinityResUNet",
            "weights": f"{nets}/em_affinity_resunet.safetensors",
            "out_channels": 3,
        },
        "patch": {"shape": [32, 96, 96]},
        "block": {"shape": [32, 128, 128]},
        "output": {"volume": "out.zarr", "dtype": "uint8"},
        "compute": {"device": "cpu", "threads": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert run_on(SerialCommunicator(), path) == 0
    with open_input(str(tmp_path / "out.zarr")) as reader:
        affinity_czyx = reader.read(reader.info.domain).result().astype(np.float32) / 255
    membranes = parse_synthetic(volume)
    truth_zyx = membranes.truth(membranes.domain)
    image_zyx = membranes.image(membranes.domain)
    assert auc(255 - image_zyx.astype(np.float32), truth_zyx) <= 0.85
    assert auc(1 - affinity_czyx.mean(axis=0), truth_zyx) >= 0.90


@pytest.mark.parametrize("stitch", ["crop", "seamless"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_identity_in_is_identity_out(tmp_path, stitch, dtype):
    volume = texture(SHAPE, dtype)
    case = Case(tmp_path, volume)
    output = {"dtype": dtype}
    config = case.run(output=output, block={"stitch": stitch}, model={"out_channels": 3})
    found = case.output(config)
    assert len(found) == 3
    if dtype == "uint8":
        assert (found == volume).all()
    else:
        np.testing.assert_allclose(found, np.broadcast_to(volume, found.shape), rtol=0, atol=1e-6)


def test_seamless_does_not_depend_on_the_block_shape(tmp_path):
    outputs = []
    for number, shape in enumerate([[8, 16, 16], [4, 24, 8], [40, 40, 40]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = Case(folder, texture(SHAPE))
        config = case.run(model=TORCH, block={"shape": shape, "stitch": "seamless"})
        outputs.append(case.output(config))
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("stitch", ["crop", "seamless"])
def test_a_roi_is_a_part_of_the_whole(tmp_path, stitch):
    outputs = []
    for name, roi in (("whole", {}), ("part", {"roi": ROI})):
        folder = tmp_path / name
        folder.mkdir()
        case = Case(folder, texture(SHAPE))
        outputs.append(case.output(case.run(model=TORCH, block={"stitch": stitch}, **roi)))
    where = (slice(None), *Box(start=ROI["start"], stop=ROI["stop"]).slices(OFFSET))
    np.testing.assert_array_equal(outputs[1][where], outputs[0][where])
    outputs[1][where] = 0
    assert not outputs[1].any()


@pytest.mark.parametrize("stitch", ["crop", "seamless"])
@pytest.mark.parametrize("invert", [False, True])
def test_a_mask_masks_the_output_and_saves_patches(tmp_path, stitch, invert):
    case = Case(tmp_path, texture(SHAPE))
    mask_zyx = np.zeros((6, 8, 9), dtype=np.uint8)
    mask_zyx[1:3, 2:4, 3:6] = 7
    mask_domain = Box.from_shape((-2, 26, 1), mask_zyx.shape)
    with h5py.File(tmp_path / "mask.h5", "w") as file:
        data = file.create_dataset("mask", data=mask_zyx)
        data.attrs["voxel_offset"] = mask_domain.start
        data.attrs["voxel_size"] = (8.0, 8.0, 16.0)
    mask = {"volume": "mask.h5", "invert": invert}
    size = {"voxel_size": [2.0, 2.0, 4.0]}
    config = case.run(model=TORCH, mask=mask, input=size, block={"stitch": stitch})
    expected = case.reference(
        config,
        mask=ReferenceMask(
            mask_zyx=mask_zyx,
            domain=mask_domain,
            voxel_size=(8.0, 8.0, 16.0),
            output_voxel_size=(2.0, 2.0, 4.0),
            invert=invert,
        ),
    )
    np.testing.assert_allclose(case.output(config), expected.values_czyx, rtol=0, atol=1e-5)
    assert case.num_patches(config) == expected.num_patches
    assert 0 < (expected.values_czyx != 0).mean() < 1


@pytest.mark.parametrize("skip", [True, False])
def test_blank_patches_are_not_run(tmp_path, skip):
    volume = texture(SHAPE)
    volume[:, :, 10:] = 0
    case = Case(tmp_path, volume)
    config = case.run(model=TORCH | {"skip_blank": skip})
    expected = case.reference(config)
    np.testing.assert_allclose(case.output(config), expected.values_czyx, rtol=0, atol=1e-5)
    assert case.num_patches(config) == expected.num_patches


@pytest.mark.parametrize(
    "output",
    [
        {"volume": "file://out/a|zarr3:", "shard_shape": [8, 16, 16]},
        {"volume": "out/b|zarr2:"},
        {"volume": "precomputed://file://out/c"},
    ],
)
def test_every_format_holds_the_same(tmp_path, output):
    case = Case(tmp_path, texture(SHAPE))
    config = case.run(model=TORCH, output=output | {"dtype": "uint8"})
    expected = case.reference(config).output_czyx
    assert np.abs(case.output(config).astype(int) - expected).max() <= 1
