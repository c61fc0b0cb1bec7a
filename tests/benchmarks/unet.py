"""A 3D U-Net as labs train them: four levels, 32 to 256 features. A model file; weights are random.

The shape of pytorch-3dunet's `UNet3D` (Wolny et al. 2020, eLife 9:e57613), written anew: two
convolutions a level, each after a norm; pooling by 2; nearest upsampling, concatenated.
"""

import torch
from torch import Tensor, nn

FEATURES = 32, 64, 128, 256
GROUPS = 8


def double(inner: int, outer: int, norm: str, *, is_encoder: bool) -> nn.Sequential:
    """Return two convolutions, each after a norm and before a ReLU."""
    middle = max(inner, outer // 2) if is_encoder else outer
    layers: list[nn.Module] = []
    for a, b in ((inner, middle), (middle, outer)):
        groups = GROUPS if a % GROUPS == 0 else 1
        normed = nn.BatchNorm3d(a) if norm == "batch" else nn.GroupNorm(groups, a)
        layers += [normed, nn.Conv3d(a, b, 3, padding=1, bias=False), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Returns what it sees, size for size; sizes are multiples of 8."""

    def __init__(self, norm: str = "group", out_channels: int = 3, features: int = 32) -> None:
        super().__init__()
        widths = [n * features // FEATURES[0] for n in FEATURES]
        inner = [1, *widths[:-1]]
        self.down = nn.ModuleList(
            double(a, b, norm, is_encoder=True) for a, b in zip(inner, widths, strict=True)
        )
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(double(a + b, b, norm, is_encoder=False) for a, b in pairs)
        self.pool = nn.MaxPool3d(2)
        self.grow = nn.Upsample(scale_factor=2, mode="nearest")
        self.head = nn.Conv3d(widths[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            kept.append(x)
        for block, skipped in zip(self.up, kept[-2::-1], strict=True):
            x = block(torch.cat([skipped, self.grow(x)], dim=1))
        return torch.sigmoid(self.head(x))
