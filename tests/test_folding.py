"""Batch norm folded into convolutions: the same but for rounding, or refused with the reason."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpichunk.backends.pytorch.engine import TorchEngine
from mpichunk.errors import ModelError
from tests.engines import make_request
from tests.realnets import NETS, PATCHES, network, scaled
from tests.torchnet import BATCH, forms, make_net

pytestmark = pytest.mark.usefixtures("one_thread")


def norms_of(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm3d) for module in network.modules())


def fold(network: nn.Module, **changes) -> TorchEngine:
    return TorchEngine(network, make_request(kernels=("fold_batch_norm",), **changes))


@pytest.mark.parametrize("form", ["module", "script"])
def test_folding_changes_nothing_but_rounding(tmp_path, form):
    net = forms(tmp_path)[form]
    with torch.no_grad():
        expected = make_net()(BATCH)
    torch.testing.assert_close(fold(net).infer(BATCH), expected, atol=1e-5, rtol=0)
    if form == "module":
        assert norms_of(net) == 0


@pytest.mark.parametrize(
    ("name", "num_left"),
    [
        ("em_affinity_resunet_same", 0),
        ("em_affinity_resunet_valid", 0),
        # The others follow a sum, which no convolution can take in.
        ("synapse_unet_microns1", 7),
    ],
)
@pytest.mark.parametrize("form", ["module", "script"])
def test_published_networks_are_the_same_when_folded(real_data, name, num_left, form):
    nets = real_data / "nets"
    with np.load(nets / "expected_io.npz") as stored:
        image, expected = scaled(stored, name)

    def make() -> nn.Module:
        path = nets / f"{name}.ts.pt"
        return torch.jit.load(path).eval() if form == "script" else network(name, nets)

    asked = {
        "patch_shape": PATCHES[name][1:],
        "crop": (NETS[name][3],) * 3,
        "batch_size": 1,
        "out_channels": len(expected),
    }
    batch_nczyx = torch.from_numpy(image)
    plain = TorchEngine(make(), make_request(**asked)).infer(batch_nczyx)
    net = make()
    found = fold(net, **asked).infer(batch_nczyx)
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    if form == "module":
        assert norms_of(net) == num_left


class Branch(nn.Module):
    """Looks at values, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.max() > 0 else x


class Twice(nn.Module):
    """Uses what a convolution returns twice: it must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm3d(2)
        self.norm.running_var *= 3

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Hidden(nn.Module):
    """Takes another way while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net.norm(self.net.first(x))
        return y if isinstance(x, torch.fx.Proxy) else y + self.net.first(x)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Branch(), "torch.fx cannot follow"),
        (Twice(), "follows a convolution directly"),
        (nn.Conv3d(1, 2, 3, padding=1), "follows a convolution directly"),
        (Hidden(), "differs by"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(network, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        fold(network.eval())
    assert caught.value.key == "compute.fold_batch_norm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(nn.Conv3d(1, 2, 3, padding=1).eval(), BATCH)
    with pytest.raises(ModelError, match="no batch norm"):
        fold(script)


def test_an_exported_network_is_not_folded(tmp_path):
    with pytest.raises(ModelError, match="list of operations"):
        fold(forms(tmp_path)["exported"])


def test_a_network_that_does_not_run_is_explained_though_it_is_to_be_folded():
    with pytest.raises(ModelError, match="takes 1 input channel, but the input has 2"):
        fold(make_net(), in_channels=2)
