"""The least that blending can be: a loop of plain torch, in memory. `efficiency` starts it.

Patches of a uint8 volume, scaled, repeated to three channels, times the window, added up; divided
by the sum of the windows, which is a product of three vectors. Prints seconds and voxels as JSON.
"""

import argparse
import json
from itertools import product
from time import perf_counter

import torch


def window(length):
    """Return chunkflow's bump, as mpichunk's `patch.window: bump`."""
    u = 2 * (torch.arange(length, dtype=torch.float64) + 1) / (length + 1) - 1
    weights = torch.exp(-1 / (1 - u**2))
    return (weights / weights.max()).clamp_min(1e-6).float()


def blend(image, patch, stride, num_channels):
    """Return (c, z, y, x) float32; the last patch of an axis ends where the image does."""
    axes = [
        [min(a, n - p) for a in range(0, n - (p - s), s)]
        for n, p, s in zip(image.shape, patch, stride, strict=True)
    ]
    windows = [window(n) for n in patch]
    weights = windows[0][:, None, None] * windows[1][:, None] * windows[2]
    total = torch.zeros((num_channels, *image.shape))
    for start in product(*axes):
        box = tuple(slice(a, a + n) for a, n in zip(start, patch, strict=True))
        prediction = (image[box].float() / 255).expand(num_channels, *patch)
        total[(slice(None), *box)] += prediction * weights
    sums = [torch.zeros(n) for n in image.shape]
    for of_axis, starts, values in zip(sums, axes, windows, strict=True):
        for a in starts:
            of_axis[a : a + len(values)] += values
    total /= sums[0][:, None, None] * (sums[1][:, None] * sums[2])
    return total


def main():
    """Blend twice, and tell of the second time."""
    parser = argparse.ArgumentParser()
    for name in ("shape", "patch", "stride"):
        parser.add_argument(f"--{name}", type=int, nargs=3, required=True)
    parser.add_argument("--channels", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    image = torch.randint(0, 256, options.shape, dtype=torch.uint8)
    with torch.inference_mode():
        for _ in range(2):
            started = perf_counter()
            found = blend(image, options.patch, options.stride, options.channels)
            seconds = perf_counter() - started
    assert torch.allclose(found[-1], image.float() / 255, atol=1e-5)
    print(json.dumps({"seconds": seconds, "num_voxels": image.numel()}))


if __name__ == "__main__":
    main()
