"""The network that ships gives the published numbers, and finds computed membranes."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from mpichunk.nets.em_affinity_resunet import EmAffinityResUNet, Padding
from mpichunk.volume.synthetic import Membranes
from tests.metrics import auc
from tests.realnets import EM_WEIGHTS, em_network

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS: dict[Padding, str] = {"same": "em_in", "valid": "em_valid_in"}


def run(net: torch.nn.Module, image_zyx: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        batch = torch.from_numpy(image_zyx.astype(np.float32) / 255)[None, None]
        return np.asarray(net(batch)[0])


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_published_numbers(real_data: Path, padding: Padding) -> None:
    example = np.load(real_data / "nets" / "expected_io.npz")
    image = example[INPUTS[padding]]
    affinity = run(em_network(padding), image)
    np.testing.assert_allclose(affinity, example[f"em_{padding}_out"], rtol=1e-4, atol=1e-4)
    published = torch.jit.load(real_data / "nets" / f"em_affinity_resunet_{padding}.ts.pt")
    np.testing.assert_allclose(affinity, run(published, image), rtol=1e-4, atol=1e-4)


def test_weights_are_the_published_ones(real_data: Path) -> None:
    published = torch.load(real_data / "nets" / "em_affinity_resunet.state_dict.pt")
    shipped = load_file(EM_WEIGHTS)
    assert shipped.keys() == published.keys()
    assert all(torch.equal(shipped[name], published[name]) for name in shipped)


def test_valid_is_the_inside_of_same() -> None:
    image = np.random.default_rng(0).integers(0, 256, (100, 100, 100), dtype=np.uint8)
    same, valid = em_network("same"), em_network("valid")
    inside = run(valid, image[1:51, 1:51, 1:51])
    assert inside.shape == (3, 8, 8, 8)
    np.testing.assert_allclose(inside, run(same, image)[:, 22:30, 22:30, 22:30], atol=1e-5)


def test_padding_is_checked() -> None:
    with pytest.raises(ValueError, match="'reflect'; it must be 'same' or 'valid'"):
        EmAffinityResUNet(padding="reflect")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 7])
def test_membranes_of_the_computed_volume_are_found(seed: int) -> None:
    """Darkness: at most 0.85. Membrane = 1 - mean of the three affinities: at least 0.90."""
    volume = Membranes(shape=(32, 160, 160), seed=seed)
    image, truth = volume.image(volume.domain), volume.truth(volume.domain)
    membrane = 1 - run(em_network(), image).mean(axis=0)
    darkness_auc, membrane_auc = auc(255 - image, truth), auc(membrane, truth)
    print(f"seed {seed}: AUC of darkness {darkness_auc:.3f}, of the network {membrane_auc:.3f}")
    assert darkness_auc <= 0.85
    assert membrane_auc >= 0.90
