"""The published networks of the real data: code, weights, and what they take and give."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mpichunk.nets import em_affinity_resunet
from mpichunk.nets.em_affinity_resunet import EmAffinityResUNet
from tests import published_nets

EM_CODE = Path(em_affinity_resunet.__file__)
EM_WEIGHTS = EM_CODE.with_suffix(".safetensors")
EM_MODEL = {
    "backend": "pytorch",
    "path": f"{EM_CODE}:EmAffinityResUNet",
    "weights": str(EM_WEIGHTS),
    "out_channels": 3,
}
"""The `model` section of a config that runs the network that ships."""

MESHNETS = {
    "meshnet_gwm_5ch": {"width": 5, "classes": 3},
    "meshnet_gwm_20ch": {"width": 20, "classes": 3, "elu": True},
    "meshnet_subcortical18_30ch": {"width": 30, "classes": 18, "elu": True},
}

NETS = {
    # name: input, divided by, output, border lost
    "em_affinity_resunet_same": ("em_in", 255, "em_same_out", 0),
    "em_affinity_resunet_valid": ("em_valid_in", 255, "em_valid_out", 21),
    "meshnet_gwm_5ch": ("mri_in", 255, "meshnet_gwm_5ch_out", 0),
    "meshnet_gwm_20ch": ("mri_in", 255, "meshnet_gwm_20ch_out", 0),
    "meshnet_subcortical18_30ch": ("mri_in", 255, "meshnet_subcortical18_30ch_argmax", 0),
    "synapse_unet_microns1": ("synapse_in", 255, "synapse_out", 0),
    "ffn_fib25_convstack": ("ffn_in", 1, "ffn_out", 0),
}
PATCHES = {
    # Channels and size of what is stored; the whole runs take patches of the same size.
    "em_affinity_resunet_same": (1, 32, 40, 48),
    "em_affinity_resunet_valid": (1, 58, 62, 66),
    "meshnet_gwm_5ch": (1, 40, 40, 48),
    "meshnet_gwm_20ch": (1, 40, 40, 48),
    "meshnet_subcortical18_30ch": (1, 40, 40, 48),
    "synapse_unet_microns1": (1, 18, 64, 72),
    "ffn_fib25_convstack": (2, 33, 33, 33),
}


def em_network(padding: Any = "same") -> EmAffinityResUNet:
    """Return the network that ships, with its weights."""
    net = EmAffinityResUNet(padding=padding)
    net.load_state_dict(load_file(EM_WEIGHTS), strict=True)
    return net.eval()


def network(name: str, nets: Path) -> torch.nn.Module:
    """Return a network with its weights."""
    if name.startswith("em_"):
        return em_network(name.rpartition("_")[2])
    net: torch.nn.Module
    if name.startswith("ffn"):
        net, state = published_nets.FFN(), torch.jit.load(nets / f"{name}.ts.pt").state_dict()
    elif name.startswith("synapse"):
        net, state = published_nets.SynapseUNet(), torch.load(nets / f"{name}.state_dict.pt")
    else:
        net = published_nets.MeshNet(**MESHNETS[name])
        state = torch.load(nets / f"{name}.state_dict.pt")
    net.load_state_dict(state)
    return net.eval()


def scaled(stored: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the network's input (1, c, z, y, x), and the stored output (c, z, y, x)."""
    source, divide, output, _ = NETS[name]
    image = stored[source].astype(np.float32)
    image = (image / np.float32(divide)).reshape(1, -1, *image.shape[-3:])
    expected = stored[output]
    return image, expected.reshape(-1, *expected.shape[-3:])
