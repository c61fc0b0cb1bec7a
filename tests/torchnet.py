"""A small network in all forms that torch loads, and a pickle that would run code."""

import warnings
from pathlib import Path

import torch
from torch import nn

from mpichunk.backends.pytorch.network import load_network
from mpichunk.config.schema import Model
from tests.engines import make_request

NET_PY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.first = nn.Conv3d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm3d(width)
        self.drop = nn.Dropout(0.5)
    def forward(self, x):
        return self.drop(self.norm(self.first(x)))

InstantiatedModel = Net()
"""


def make_net() -> nn.Module:
    """Return the network, with the same weights each time."""
    namespace: dict[str, type[nn.Module]] = {}
    exec(NET_PY, namespace)
    torch.manual_seed(1)
    net = namespace["Net"]()
    with torch.no_grad():
        net.norm.running_mean += 0.3
    return net.eval()


BATCH = torch.rand(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def expected() -> torch.Tensor:
    """Return what the network makes of `BATCH`."""
    with torch.no_grad():
        return make_net()(BATCH)


def export(net: nn.Module, path: Path, shape=(2, 1, 4, 8, 8), *, axes=(0, 2, 3, 4)) -> Path:
    """Save a network as torch.export does; sizes along `axes` may be any."""
    dynamic = ({axis: torch.export.Dim.AUTO for axis in axes},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (torch.zeros(shape),), dynamic_shapes=dynamic)
        torch.export.save(program, path)
    return path


def forms(folder: Path) -> dict[str, nn.Module]:
    """Return one network as all that torch loads."""
    net = make_net()
    model = Model(backend="pytorch", path=str(export(net, folder / "net.pt2")), out_channels=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Through a file: what was scripted in one process shares its graph, which runs alter.
        torch.jit.script(nn.Sequential(*make_net().children())).save(folder / "net.ts")
        script = torch.jit.load(folder / "net.ts").eval()
    return {"module": net, "script": script, "exported": load_network(model, make_request())}


class Payload:
    """Stands for code in a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "ran"))
