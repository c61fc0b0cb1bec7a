"""The networks of the real data as plain PyTorch, as a lab would keep them: a model file.

Only their weights are published; tests load this file by `published_nets.py:Name`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

DILATIONS = 1, 2, 4, 8, 16, 8, 4, 2, 1


class MeshNet(nn.Sequential):
    """Dilated convolutions and nothing else (Fedorov et al. 2017, arXiv:1612.00940)."""

    def __init__(self, width: int, classes: int, elu: bool = False) -> None:
        layers: list[nn.Module] = []
        channels = 1
        for dilation in DILATIONS:
            layers.append(nn.Conv3d(channels, width, 3, padding=dilation, dilation=dilation))
            layers.append(nn.ELU() if elu else nn.ReLU())
            channels = width
        super().__init__(*layers, nn.Conv3d(width, classes, 1))


def conv(inner: int, outer: int, depth: int, width: int, *, bias: bool = False) -> nn.Conv3d:
    """Return a convolution that keeps its grid."""
    kernel = depth, width, width
    return nn.Conv3d(inner, outer, kernel, padding=[n // 2 for n in kernel], bias=bias)


class Residual(nn.Module):
    """Three convolutions, the last two around a shortcut."""

    def __init__(self, inner: int, outer: int, depth: int) -> None:
        super().__init__()
        self.c1 = conv(inner, outer, 1, 3)
        self.c2, self.c3 = conv(outer, outer, depth, 3), conv(outer, outer, depth, 3)
        self.n1, self.n2, self.n3 = (nn.BatchNorm3d(outer) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = functional.elu(self.n1(self.c1(x)))
        second = functional.elu(self.n2(self.c2(first)))
        return functional.elu(self.n3(self.c3(second) + first))


class Up(nn.Module):
    """Doubles y and x, and adds what was there before."""

    def __init__(self, inner: int, outer: int, depth: int) -> None:
        super().__init__()
        self.c, self.n = conv(inner, outer, depth, 3), nn.BatchNorm3d(outer)
        self.m = Residual(outer, outer, depth)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        x = functional.interpolate(x, scale_factor=(1.0, 2.0, 2.0))
        return self.m(functional.elu(self.n(self.c(x) + skipped)))


class SynapseUNet(nn.Module):
    """An anisotropic residual U-Net (Lee et al. 2017, arXiv:1706.00120)."""

    def __init__(self) -> None:
        super().__init__()
        self.i = conv(1, 28, 1, 5, bias=True)
        self.d0, self.d1, self.d2 = Residual(28, 28, 1), Residual(28, 36, 3), Residual(36, 48, 3)
        self.p = nn.MaxPool3d((1, 2, 2))
        self.u1, self.u0 = Up(48, 36, 3), Up(36, 28, 1)
        self.e, self.o = conv(28, 28, 1, 3, bias=True), conv(28, 1, 1, 5, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.d0(functional.elu(self.i(x)))
        middle = self.d1(self.p(fine))
        coarse = self.d2(self.p(middle))
        x = self.u0(self.u1(coarse, middle), fine)
        return torch.sigmoid(self.o(functional.elu(self.e(x))))


class FFN(nn.Module):
    """The convolutions of a flood-filling network (Januszewski et al. 2018)."""

    def __init__(self, depth: int = 11, width: int = 32) -> None:
        super().__init__()
        self.a0, self.b0 = conv(2, width, 3, 3, bias=True), conv(width, width, 3, 3, bias=True)
        self.a = nn.ModuleList(conv(width, width, 3, 3, bias=True) for _ in range(depth))
        self.b = nn.ModuleList(conv(width, width, 3, 3, bias=True) for _ in range(depth))
        self.lom = nn.Conv3d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b0(torch.relu(self.a0(x)))
        for a, b in zip(self.a, self.b, strict=True):
            y = y + b(torch.relu(a(torch.relu(y))))
        return self.lom(torch.relu(y))
