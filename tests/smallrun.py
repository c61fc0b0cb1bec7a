"""A run of a small network in code over a small volume, for tests of whole runs and benchmarks."""

from pathlib import Path
from typing import Any

from mpichunk.verbs.bench import Options
from tests.endtoend import write_config

NET = """
import torch

class Net(torch.nn.Module):
    '''Two convolutions with random but fixed weights; no padding if not `same`.'''

    def __init__(self, same=True, channels=1, outputs=2, norm=False):
        super().__init__()
        torch.manual_seed(5)
        pad = 1 if same else 0
        self.a = torch.nn.Conv3d(channels, 4, 3, padding=pad)
        self.b = torch.nn.Conv3d(4, outputs, 3, padding=pad)
        if norm:
            norm = torch.nn.BatchNorm3d(4)
            norm.running_mean += torch.linspace(-0.3, 0.4, 4)
            norm.running_var *= torch.linspace(0.2, 3, 4)
            self.a = torch.nn.Sequential(self.a, norm)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))
"""

SHORT = Options(num_repeats=2, num_blocks=2, as_json=True)
"""A benchmark that takes no longer than it must."""


def config_file(folder: Path, **sections: Any) -> Path:
    """Write the network and its config; what a section lacks has a default."""
    values: dict[str, Any] = {
        "input": {"volume": "synthetic://membranes?shape=24,40,40&seed=3"},
        "model": {"backend": "pytorch", "path": "net.py:Net", "out_channels": 2},
        "patch": {"shape": [8, 16, 16], "overlap": [2, 4, 4]},
        "block": {"shape": [12, 16, 16]},
        "output": {"volume": "out/pred.zarr", "dtype": "uint8", "chunk_shape": [12, 8, 8]},
        "compute": {"device": "cpu", "threads": 1},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    path = write_config(folder, **values)
    (folder / "net.py").write_text(NET)
    return path
