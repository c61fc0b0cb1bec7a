"""What the pytorch backend loads: published networks, code and weights in every form."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mpichunk.backends import get_backend
from mpichunk.block.inference import check_engine
from mpichunk.config.scaling import Scaling
from mpichunk.errors import ModelError
from tests.modelfolder import NET_PY, load, make_request, pytorch, tiny, write_models

RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("nets"))


# ---- Real networks -------------------------------------------------------------------------------

REAL_NETS = [
    # name, input, scale, output
    ("em_affinity_resunet_same", "em_in", 255, "em_same_out", (0, 0, 0)),
    ("em_affinity_resunet_valid", "em_valid_in", 255, "em_valid_out", (21, 21, 21)),
    ("meshnet_gwm_5ch", "mri_in", 255, "meshnet_gwm_5ch_out", (0, 0, 0)),
    ("synapse_unet_microns1", "synapse_in", 255, "synapse_out", (0, 0, 0)),
    ("ffn_fib25_convstack", "ffn_in", 1, "ffn_out", (0, 0, 0)),
]


@pytest.mark.parametrize(("name", "source", "scale", "wanted", "crop"), REAL_NETS)
def test_real_torchscript_networks_give_the_expected_values(
    real_data, name, source, scale, wanted, crop
):
    stored = np.load(real_data / "nets" / "expected_io.npz")
    source_czyx = stored[source].reshape(-1, *stored[source].shape[-3:])
    expected = stored[wanted].reshape(-1, *stored[wanted].shape[-3:])
    request = make_request(
        patch_shape=source_czyx.shape[1:],
        crop=crop,
        in_channels=source_czyx.shape[0],
        out_channels=expected.shape[0],
    )
    model = pytorch(real_data / "nets" / f"{name}.ts.pt")
    assert get_backend("pytorch").model_files(model) == [Path(model.path)]
    engine = get_backend("pytorch").load(model, request)
    arrays = engine.arrays
    whole = [(slice(None), slice(None), slice(None))]
    staged = arrays.stage(
        arrays.feed(source_czyx), whole, patch_shape=request.patch_shape, batch_size=1
    )
    batch = arrays.gather(staged, scaling=Scaling(divide=float(scale)))
    found = arrays.download(engine.infer(batch))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_shipped_network_is_the_one_of_the_checkpoint(real_data):
    package = "mpichunk.nets.em_affinity_resunet:EmAffinityResUNet"
    shipped = Path(sys.modules["mpichunk"].__file__).parent / "nets"
    stored = np.load(real_data / "nets" / "expected_io.npz")
    batch = torch.from_numpy(stored["em_in"].astype(np.float32) / 255)[None, None]
    changes = {"patch_shape": (32, 40, 48), "out_channels": 3}
    for path, weights in (
        (package, shipped / "em_affinity_resunet.safetensors"),
        (
            f"{shipped / 'em_affinity_resunet.py'}:EmAffinityResUNet",
            real_data / "nets" / "em_affinity_resunet.state_dict.pt",
        ),
    ):
        model = pytorch(path, weights=str(weights), arguments={"padding": "same"})
        found = load(model, **changes).infer(batch)[0].numpy()
        np.testing.assert_allclose(found, stored["em_same_out"], rtol=1e-4, atol=1e-4)
        assert get_backend("pytorch").model_files(model) == [
            shipped / "em_affinity_resunet.py",
            weights,
        ]


# ---- Forms of weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", ["plain.pt", "plain.safetensors", "lightning.pt", "ddp.pt", "both.pt", "old.pt"]
)
def test_weights_in_every_form(folder, weights):
    model = pytorch(f"{folder / 'net.py'}:Tiny", weights=str(folder / weights))
    batch = torch.from_numpy(RNG.normal(size=(1, 1, 8, 12, 16)).astype(np.float32))
    with torch.no_grad():
        expected = tiny(folder)(batch)
    torch.testing.assert_close(load(model).infer(batch), expected)


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("net.py:factory", {}),
        ("net.py:Tiny", {"width": 2, "out": 1}),
        ("neighbour_net.py:Mine", {}),
        ("script.pt", {}),  # weights of a file replace those that TorchScript holds
    ],
)
def test_forms_of_networks(folder, path, arguments):
    model = pytorch(folder / path, weights=str(folder / "half.pt"), arguments=arguments)
    engine = load(model, batch_size=2)
    batch = torch.from_numpy(RNG.normal(size=(2, 1, 8, 12, 16)).astype(np.float32))
    with torch.no_grad():
        expected = tiny(folder)(batch)
    torch.testing.assert_close(engine.infer(batch), expected, rtol=1e-2, atol=1e-2)
    assert not list(folder.rglob("__pycache__/net*mpichunk*"))
    check_engine(engine, make_request(batch_size=2))
    assert engine.info.backend == "pytorch" and engine.info.threads == 1


def test_importable_module(folder, monkeypatch):
    package = folder / "labnets" / "inner"
    package.mkdir(parents=True)
    # A parent package that cannot be imported proves that finding the files imports nothing.
    (folder / "labnets" / "__init__.py").write_text("import os\nPARENT = 1\n")
    (package / "unet.py").write_text(NET_PY)  # in a namespace package, without __init__.py
    monkeypatch.syspath_prepend(folder)
    model = pytorch("labnets.inner.unet:Half")
    assert get_backend("pytorch").model_files(model) == [package / "unet.py"]
    assert "labnets" not in sys.modules
    check_engine(load(model), make_request())
    with pytest.raises(ModelError, match=r"no module 'labnets\.other'") as caught:
        load(pytorch("labnets.other:Net"))
    assert caught.value.key == "model.path"
