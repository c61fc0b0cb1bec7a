"""A small 3D U-Net that predicts neuron affinities in isotropic electron microscopy.

Plain PyTorch, usable by itself: knows no configuration, no volumes, no patches. Weights:
`em_affinity_resunet.safetensors`; origin and attribution: `em_affinity_resunet.LICENSE.txt`.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Padding = Literal["same", "valid"]

CHANNELS = 8, 24, 48
"""Features of the three levels, finest first."""


class EmAffinityResUNet(nn.Module):
    r"""Three-level residual 3D U-Net (Lee et al. 2017, arXiv:1706.00120, on an isotropic grid).

    The symmetric residual U-Net of that paper, smaller, with two levels of 2x2x2 pooling:

        stem e0 ------------ + up0 d0 -> head -> sigmoid      8 features
               \            /
                pool e1 -- + up1 d1                          24 features
                       \  /
                        pool e2                              48 features

    Output channel c is the affinity between voxel v and its predecessor v - e_c, c = z, y, x:
    1 within a neuron, 0 across a membrane.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, padding: Padding = "same") -> None:
        """Build the network; both paddings have the same parameters.

        Args:
            padding: `same` (zero padding; sizes are multiples of 4 and stay) or `valid` (no
                padding; sizes are 2 mod 4 and lose 21 voxels on each side).

        Raises:
            ValueError: any other padding.
        """
        super().__init__()
        if padding not in ("same", "valid"):
            raise ValueError(f"padding is {padding!r}; it must be 'same' or 'valid'")
        fine, middle, coarse = CHANNELS
        width = 1 if padding == "same" else 0
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.stem = nn.Conv3d(1, fine, 3, padding=width)
        self.e0 = Residual(fine, fine, width)
        self.e1 = Residual(fine, middle, width)
        self.e2 = Residual(middle, coarse, width)
        self.pool = nn.MaxPool3d(2)
        self.up1 = nn.ConvTranspose3d(coarse, middle, 2, stride=2)
        self.d1 = Residual(middle, middle, width)
        self.up0 = nn.ConvTranspose3d(middle, fine, 2, stride=2)
        self.d0 = Residual(fine, fine, width)
        self.head = nn.Conv3d(fine, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return the affinities of an image.

        Args:
            image: (n, 1, z, y, x) float32, uint8 intensity divided by 255.

        Returns:
            (n, 3, z', y', x') float32 in [0, 1]; for `valid`, z' = z - 42 and so on.
        """
        return torch.sigmoid(self.logits(image))

    def logits(self, image: Tensor) -> Tensor:
        """Return what `forward` passes through the sigmoid."""
        # Encode.
        features = functional.relu(self.stem((image - self.mean) / self.std))
        skip0 = self.e0(features)
        skip1 = self.e1(self.pool(skip0))
        features = self.e2(self.pool(skip1))

        # Decode; skip connections are summed, not concatenated.
        features = self.up1(features)
        features = self.d1(features + crop_like(skip1, features))
        features = self.up0(features)
        features = self.d0(features + crop_like(skip0, features))
        logits: Tensor = self.head(features)
        return logits


class Residual(nn.Module):
    """Two 3x3x3 convolutions with batch norm, around a 1x1x1 projection (He et al. 2015)."""

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        """Build the block; `width` voxels of zero padding in each convolution."""
        super().__init__()
        self.c1 = nn.Conv3d(in_channels, out_channels, 3, padding=width, bias=False)
        self.b1 = nn.BatchNorm3d(out_channels)
        self.c2 = nn.Conv3d(out_channels, out_channels, 3, padding=width, bias=False)
        self.b2 = nn.BatchNorm3d(out_channels)
        self.sk = nn.Conv3d(in_channels, out_channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return (n, out_channels, ...); without padding 2 voxels less on each side."""
        change = functional.relu(self.b1(self.c1(features)))
        change = self.b2(self.c2(change))
        return functional.relu(change + crop_like(self.sk(features), change))


def crop_like(larger: Tensor, smaller: Tensor) -> Tensor:
    """Return the centre of `larger` (n, c, z, y, x) that has the spatial shape of `smaller`."""
    for axis in (2, 3, 4):
        length = smaller.shape[axis]
        larger = larger.narrow(axis, (larger.shape[axis] - length) // 2, length)
    return larger
