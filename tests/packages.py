"""Packages for tests: bioimage.io's and MONAI's, made of small networks as their authors would."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml

from tests import onnx_maker
from tests.realnets import EM_CODE, em_network

POINTS = '''
import torch


class Points(torch.nn.Module):
    """Multiplies its input by a number for each channel of its output."""

    def __init__(self, channels=2):
        super().__init__()
        self.w = torch.nn.Conv3d(1, channels, 1, bias=False)

    def forward(self, x):
        return self.w(x)
'''


def space(name: str, size: Any, **more: Any) -> dict[str, Any]:
    return {"type": "space", "id": name, "size": size, **more}


def output_space(name: str, offset: int = 0, **more: Any) -> dict[str, Any]:
    return space(name, {"tensor_id": "image", "axis_id": name, "offset": offset}, **more)


def description(
    weights: dict[str, Any],
    *,
    channels: int,
    size: Any = None,
    before: list[dict[str, Any]] | None = None,
    after: list[dict[str, Any]] | None = None,
    offset: int = 0,
    halo: list[int] | None = None,
) -> dict[str, Any]:
    """Return a description of a network for volumes, in version 0.5 of the format."""
    size = size or {"min": 16, "step": 4}
    halos = [{"halo": n} if n else {} for n in halo or [0, 0, 0]]
    names = [f"c{i}" for i in range(channels)]
    return {
        "type": "model",
        "format_version": "0.5.4",
        "name": "Network of a test",
        "description": "Made by a test.",
        "license": "Apache-2.0",
        "authors": [{"name": "Somebody"}],
        "cite": [{"text": "nobody", "doi": "10.1000/xyz"}],
        "documentation": "README.md",
        "inputs": [
            {
                "id": "image",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": ["em"]},
                    *(space(name, size, unit="nanometer", scale=10) for name in "zyx"),
                ],
                "data": {"type": "uint8"},
                "test_tensor": {"source": "in.npy"},
                "preprocessing": before or [FLOAT],
            }
        ],
        "outputs": [
            {
                "id": "result",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": names},
                    *(
                        output_space(name, offset, unit="nanometer", scale=10, **more)
                        for name, more in zip("zyx", halos, strict=True)
                    ),
                ],
                "test_tensor": {"source": "out.npy"},
                "postprocessing": after or [],
            }
        ],
        "weights": weights,
    }


FLOAT = {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}}
BY_255 = [FLOAT, {"id": "fixed_zero_mean_unit_variance", "kwargs": {"mean": 0, "std": 255}}, FLOAT]


def write_package(folder: Path, content: dict[str, Any], name: str = "rdf.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def em_package(folder: Path, *forms: str, padding: str = "same", **how: Any) -> Path:
    """Write a package of the trained network."""
    folder.mkdir(parents=True)
    network = em_network(padding)
    weights: dict[str, Any] = {}
    if "pytorch_state_dict" in forms:
        shutil.copy(EM_CODE, folder / "net.py")
        torch.save(network.state_dict(), folder / "weights.pt")
        code = {
            "source": "net.py",
            "callable": "EmAffinityResUNet",
            "kwargs": {"padding": padding},
        }
        weights["pytorch_state_dict"] = {
            "source": "weights.pt",
            "pytorch_version": "2.6.0",
            "architecture": code,
        }
    if "torchscript" in forms:
        torch.jit.script(network).save(str(folder / "net.ts.pt"))
        weights["torchscript"] = {"source": "net.ts.pt", "pytorch_version": "2.6.0"}
    return write_package(folder, description(weights, channels=3, before=BY_255, **how))


def points_package(folder: Path, **how: Any) -> Path:
    """Write a package of a network that multiplies, in every form."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(POINTS)
    state = {"w.weight": torch.tensor(onnx_maker.SCALES).reshape(2, 1, 1, 1, 1)}
    torch.save(state, folder / "weights.pt")
    onnx_maker.convolution(folder / "net.onnx")
    weights = {
        "onnx": {"source": "net.onnx", "opset_version": 17},
        "pytorch_state_dict": {
            "source": "weights.pt",
            "pytorch_version": "2.6.0",
            "architecture": {"source": "net.py", "callable": "Points", "kwargs": {"channels": 2}},
        },
    }
    content = description(weights, channels=2, **how)
    return write_package(folder, content)


UNET: dict[str, Any] = {
    "_target_": "BasicUNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": "@num_classes",
    "features": [4, 4, 8, 8, 8, 4],
    "act": ["LeakyReLU", {"negative_slope": 0.1, "inplace": True}],
    "norm": "@norms::0",
}

INFERENCE: dict[str, Any] = {
    "imports": ["$import glob"],
    "bundle_root": ".",
    "device": "$torch.device('cpu')",
    "num_classes": 2,
    "norms": ["batch", "instance"],
    "network_def": UNET,
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {
                "_target_": "monai.transforms.ScaleIntensityRanged",
                "keys": "image",
                "a_min": 20,
                "a_max": 220,
                "b_min": -1.0,
                "b_max": 1.0,
                "clip": True,
            },
            {"_target_": "EnsureTyped", "keys": "image"},
        ],
    },
    "inferer": {
        "_target_": "SlidingWindowInferer",
        "roi_size": [16, 32, 32],
        "sw_batch_size": 4,
        "overlap": 0.5,
    },
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {"_target_": "SaveImaged", "keys": "pred"},
        ],
    },
}

METADATA: dict[str, Any] = {
    "version": "0.0.1",
    "network_data_format": {
        "inputs": {"image": {"num_channels": 1, "spatial_shape": ["16*n", "16*n", "16*n"]}},
        "outputs": {"pred": {"num_channels": 2}},
    },
}


def write_bundle(
    folder: Path, *, inference: dict[str, Any] | None = None, metadata: Any = METADATA
) -> Path:
    """Write the configs of a bundle; entries of `inference` replace those of a common one."""
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    config = deepcopy(INFERENCE) | (inference or {})
    (folder / "configs/inference.json").write_text(json.dumps(config))
    if metadata is not None:
        (folder / "configs/metadata.json").write_text(json.dumps(metadata))
    return folder


SIGMOID = [{"_target_": "Activationsd", "sigmoid": True}]


def unet_bundle(folder: Path, **how: Any) -> Path:
    """Write a bundle of a small random U-Net, made by MONAI as its users make it."""
    from monai.bundle import ConfigParser

    write_bundle(folder, **how)
    parser = ConfigParser()
    parser.read_config(str(folder / "configs/inference.json"))
    torch.manual_seed(3)
    network = parser.get_parsed_content("network_def").eval()
    torch.save(network.state_dict(), folder / "models/model.pt")
    torch.jit.script(network).save(str(folder / "models/model.ts"))
    return folder


def points_network(**arguments: Any) -> dict[str, Any]:
    """Return what a bundle says of a network that multiplies."""
    return {"network_def": {"_target_": "scripts.net.Points"} | arguments}


def points_bundle(folder: Path, **how: Any) -> Path:
    """Write a bundle whose network needs no MONAI."""
    how["inference"] = (
        points_network() | {"preprocessing": None, "postprocessing": None} | how["inference"]
    )
    write_bundle(folder, **how)
    (folder / "scripts").mkdir()
    (folder / "scripts/net.py").write_text(POINTS)
    torch.save({"w.weight": torch.ones(2, 1, 1, 1, 1)}, folder / "models/model.pt")
    return folder
