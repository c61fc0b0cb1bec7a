"""What the benchmarks share, and what they compare with."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mpichunk.geometry.blending import window
from mpichunk.volume import open_input
from tests.benchmarks import common, image, plain_loop, unet


def test_repeats_take_turns() -> None:
    order: list[str] = []

    def measure(name: str) -> int:
        order.append(name)
        return len(order)

    found = common.interleave({name: partial(measure, name) for name in "ab"}, 3)
    assert order == list("ababab")
    assert found == {"a": [1, 3, 5], "b": [2, 4, 6]}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "not measured"),
        ([0.5], "0.500"),
        ([3.0, 1.0, 2.0], "2.00 (1.00 to 3.00)"),
        ([1234.4], "1234"),
        ([0.95123, 12.345, 123.4], "12.3 (0.951 to 123)"),
    ],
)
def test_cells(values: list[float], text: str) -> None:
    assert common.spread(values) == text


def test_machine_says_what_figures_depend_on() -> None:
    words = common.machine_words(common.machine())
    assert f"torch {torch.__version__}" in words and "cores" in words and "load" in words


def test_image_is_written_once(tmp_path: Path) -> None:
    path, shape = tmp_path / "em.zarr", (70, 30, 300)
    image.write(path, shape)
    with open_input(str(path)) as reader:
        found = np.asarray(reader.read(reader.info.domain).result())[0]
    assert found.shape == shape and found.dtype == np.uint8
    assert found.std() > 10
    np.testing.assert_array_equal(found[64:], found[:6])
    assert common.write_image(path, (1, 1, 1)) == path


def test_plain_loop_blends_as_mpichunk_does() -> None:
    np.testing.assert_allclose(plain_loop.window(20), window("bump", 20), rtol=1e-6)
    volume = torch.randint(0, 256, (20, 24, 30), dtype=torch.uint8)
    found = plain_loop.blend(volume, (8, 12, 12), (6, 8, 8), 2)
    assert found.shape == (2, 20, 24, 30)
    torch.testing.assert_close(found[1], volume.float() / 255)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_unet_keeps_the_size(norm: str) -> None:
    net = unet.UNet(norm=norm, features=8).eval()
    with torch.inference_mode():
        found = net(torch.zeros(1, 1, 8, 16, 24))
    assert found.shape == (1, 3, 8, 16, 24)
