"""A folder of models for the pytorch backend, good and bad ones, and the network in them."""

import pickle
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mpichunk.backends import get_backend
from mpichunk.config.schema import Model
from tests import engines

make_request = partial(engines.make_request, patch_shape=(8, 12, 16), batch_size=1, out_channels=1)


def pytorch(path, **changes):
    return Model(backend="pytorch", path=str(path), **changes)


def load(model, **changes):
    return get_backend("pytorch").load(model, make_request(**changes))


NET_PY = '''
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, width=2, out=1):
        super().__init__()
        self.first = nn.Conv3d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm3d(width)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Conv3d(width, out, 1)
    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x))))

class Half(nn.Module):
    """Halves its grid twice: sizes are multiples of (1, 4, 4)."""
    def forward(self, x):
        small = nn.functional.avg_pool3d(x, (1, 4, 4))
        return x + nn.functional.interpolate(small, scale_factor=(1.0, 4.0, 4.0))

class Pooled(nn.Module):
    """As Half, but what does not fill a pool is missing from what it returns."""
    def forward(self, x):
        small = nn.functional.avg_pool3d(x, (1, 4, 4))
        return nn.functional.interpolate(small, scale_factor=(1.0, 4.0, 4.0))

class Lossy(nn.Module):
    def __init__(self, lost=(2, 2, 2)):
        super().__init__()
        self.lost = lost
    def forward(self, x):
        z, y, x_ = self.lost
        return x[:, :, z:x.shape[2]-z or None, y:x.shape[3]-y or None, x_:x.shape[4]-x_ or None]

class Odd(nn.Module):
    def forward(self, x):
        return x[:, :, 1:]

class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what
    def forward(self, x):
        if self.what == "error":
            raise KeyError("no such layer")
        return {
            "tuple": (x,), "list": [None, x], "dict": {"logits": x, "loss": None},
            "double": x.double(),
            "two": (x, x), "none": None, "flat": x[:, 0], "nan": x / 0 * 0, "text": "x",
            "stretched": x.expand(-1, 3, -1, -1, -1), "weights": x[:, [0, 0]],
        }[self.what]

def factory(width=2):
    return Tiny(width=width)

def not_a_network():
    return 5

def failing():
    raise FileNotFoundError("my_weights.bin")

ready = Half()
'''


def write_models(path: Path) -> Path:
    """Write networks as code and as files, and weights in every form; return the folder."""
    (path / "net.py").write_text(NET_PY)
    (path / "needs_missing.py").write_text("import numpy\n\nimport no_such_package\n")
    (path / "neighbour_net.py").write_text(
        "import sys\nfrom net import Tiny\nassert __name__ in sys.modules\nclass Mine(Tiny): pass\n"
    )
    (path / "broken.py").write_text("class Net(:\n")
    (path / "exits.py").write_text("raise SystemExit(3)\n")
    (path / "nothing.py").write_text("VALUE = 3\n")
    network = tiny(path)
    state = network.state_dict()
    torch.save(state, path / "plain.pt")
    save_file(state, path / "plain.safetensors")
    torch.save({"epoch": 3, "state_dict": state}, path / "lightning.pt")
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in state.items()}}, path / "ddp.pt")
    torch.save({"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, path / "both.pt")
    old = {k: v for k, v in state.items() if "num_batches" not in k}
    torch.save(old, path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({k: v.half() for k, v in state.items()}, path / "half.pt")
    torch.save({"renamed.weight": state["first.weight"], **old}, path / "unexpected.pt")
    torch.save({k: v for k, v in old.items() if k != "last.bias"}, path / "missing.pt")
    torch.save({"optimizer": {"lr": 1.0}, "epoch": 3}, path / "no_tensors.pt")
    torch.save([1, 2], path / "list.pt")
    torch.save({"state_dict": state, "extra": Payload()}, path / "code.pt")
    torch.save(nn.Linear(1, 1), path / "whole_module.pt")
    (path / "plain_pickle.pt").write_bytes(pickle.dumps({"a": Payload()}, protocol=2))
    (path / "text.pt").write_text("not a network at all")
    (path / "empty.pt").write_bytes(b"")
    (path / "bad.safetensors").write_text("not safetensors")
    whole = (path / "plain.pt").read_bytes()
    (path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.jit.script(network).save(path / "script.pt")
    script = (path / "script.pt").read_bytes()
    (path / "cut_script.pt").write_bytes(script[: len(script) // 2])
    program = torch.export.export(nn.Conv3d(1, 1, 1), (torch.zeros(1, 1, 4, 4, 4),))
    torch.export.save(program, path / "program.pt2")
    (path / "net.onnx").write_bytes(b"\x08\x07")
    return path


class Payload:
    """Stands for code in a pickle."""

    def __reduce__(self):
        return (print, ("a pickle ran code",))


def tiny(folder: Path) -> nn.Module:
    """Return the network whose weights the folder holds."""
    torch.manual_seed(0)
    namespace = {}
    exec(compile(NET_PY, str(folder / "net.py"), "exec"), namespace)
    network = namespace["Tiny"]()
    network.norm.running_mean += 0.3
    network.norm.running_var *= 2
    # Scripting needs the source, which exec has: the file of that name was written before.
    return network.eval()
