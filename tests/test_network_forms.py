"""Every published network in every form that there is, through every backend that takes it.

Against the values that its authors' framework gave, and over a real volume against one another.
"""

from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mpichunk.backends import get_backend
from mpichunk.config.schema import Model
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.verbs.run import run_on
from tests import published_nets
from tests.endtoend import read_volume, write_config
from tests.engines import make_request
from tests.optional import need
from tests.realnets import EM_CODE, MESHNETS, NETS, PATCHES, network, scaled
from tests.torchnet import export

pytestmark = pytest.mark.usefixtures("one_thread")

CODE = published_nets.__file__

DYNAMIC = ("em_affinity_resunet_same",)
"""Exported for any patch; that takes torch a while, and longer where sizes are no multiples."""
NO_ONNX = "em_affinity_resunet_valid", "ffn_fib25_convstack"
FORMS = {
    "pytorch": ("script", "module", "pt2"),
    "onnxruntime": ("onnx",),
    "openvino": ("script", "module", "pt2", "onnx", "xml"),
}
CASES = [
    (name, backend, form)
    for name in NETS
    for backend, forms in FORMS.items()
    for form in forms
    if not (name in NO_ONNX and form in ("onnx", "xml"))
]


@pytest.fixture(scope="module")
def form_of(tmp_path_factory, real_data):
    """Return `form_of(name, form)`: what `model` says in the config; files are made once."""
    folder = tmp_path_factory.mktemp("forms")
    nets = real_data / "nets"

    @cache
    def make(name: str, form: str) -> dict[str, object]:
        if form == "script":
            return {"path": str(nets / f"{name}.ts.pt")}
        if form == "onnx":
            return {"path": str(nets / f"{name}.onnx")}
        if form == "xml":
            import openvino

            openvino.save_model(
                openvino.Core().read_model(nets / f"{name}.onnx"),
                folder / f"{name}.xml",
                compress_to_fp16=False,
            )
            return {"path": str(folder / f"{name}.xml")}
        if form == "pt2":
            path = folder / f"{name}.pt2"
            # For any patch, an example of one would fix the batch.
            batch, axes = (2, (0, 2, 3, 4)) if name in DYNAMIC else (1, ())
            export(network(name, nets), path, (batch, *PATCHES[name]), axes=axes)
            return {"path": str(path)}
        return module_form(name, nets, folder)

    return make


def module_form(name: str, nets: Path, folder: Path) -> dict[str, object]:
    """Return a network as code and weights."""
    if name.startswith("em_"):
        arguments = {"padding": name.rpartition("_")[2]}
        weights = nets / "em_affinity_resunet.state_dict.pt"
        return {
            "path": f"{EM_CODE}:EmAffinityResUNet",
            "weights": str(weights),
            "arguments": arguments,
        }
    weights = nets / f"{name}.state_dict.pt"
    if name.startswith("ffn"):
        weights = folder / "ffn.pt"
        torch.save(torch.jit.load(nets / f"{name}.ts.pt").state_dict(), weights)
        return {"path": f"{CODE}:FFN", "weights": str(weights)}
    if name.startswith("synapse"):
        return {"path": f"{CODE}:SynapseUNet", "weights": str(weights)}
    return {"path": f"{CODE}:MeshNet", "weights": str(weights), "arguments": MESHNETS[name]}


@pytest.fixture(scope="module")
def stored(real_data):
    with np.load(real_data / "nets" / "expected_io.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("name", "backend", "form"), CASES)
def test_expected_values(stored, form_of, name, backend, form):
    if backend != "pytorch":
        need(backend)
    batch_nczyx, expected = scaled(stored, name)
    labels = name == "meshnet_subcortical18_30ch"
    lost = NETS[name][3]
    request = make_request(
        patch_shape=batch_nczyx.shape[2:],
        crop=(lost, lost, lost),
        batch_size=1,
        in_channels=batch_nczyx.shape[1],
        out_channels=18 if labels else len(expected),
    )
    model = Model(backend=backend, out_channels=request.out_channels, **form_of(name, form))
    engine = get_backend(backend).load(model, request)
    arrays = engine.arrays
    found = np.array(arrays.download(engine.infer(arrays.upload(batch_nczyx[0])[None])))[0]
    if labels:
        # Of the logits, only the largest is stored; rounding may decide between two equal ones.
        differs = found.argmax(axis=0) != expected[0]
        assert differs.mean() < 1e-4
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert engine.info.precision == "float32"
    assert (engine.info.backend, engine.info.threads) == (backend, 1)


# ---- Over a real volume --------------------------------------------------------------------------

EM = {"volume": "em/fib25_train2_250.h5", "dataset": "image"}
SYNAPSE = {"volume": "em/microns_phase1_samples.h5", "dataset": "sample1/image"}
RUNS = {
    # name: input, ROI, patch, block shape; every one has several blocks, some of them clipped
    "em_affinity_resunet_same": (
        EM,
        ([200, 0, 10], [224, 40, 60]),
        {"shape": [32, 32, 40], "overlap": [8, 8, 8], "batch_size": 2},
        [24, 40, 32],
    ),
    "em_affinity_resunet_valid": (
        EM,
        ([200, 0, 10], [216, 40, 60]),
        {"shape": [58, 62, 66], "crop": [21, 21, 21], "overlap": [4, 4, 4]},
        [12, 32, 40],
    ),
    "synapse_unet_microns1": (
        SYNAPSE,
        ([0, 120, 100], [18, 184, 190]),
        {"shape": [18, 64, 72], "overlap": [3, 16, 16]},
        [18, 64, 56],
    ),
}


WHOLE = ("pytorch", "script"), ("onnxruntime", "onnx"), ("openvino", "script")
"""What runs whole below; of one network the exported file as well."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_whole_runs_agree(tmp_path, real_data, form_of, name):
    """Blended and stitched outputs of all backends and forms lie within 1e-4 of one another."""
    need("onnxruntime", "openvino")
    source, (start, stop), patch, block = RUNS[name]
    outputs = {}
    exported = [(backend, "pt2") for backend in ("pytorch", "openvino") if name in DYNAMIC]
    for backend, form in [*WHOLE, *exported]:
        if (name, backend, form) not in CASES:
            continue
        folder = tmp_path / f"{backend}-{form}"
        config = write_config(
            folder,
            input=source | {"volume": str(real_data / source["volume"])},
            roi={"start": start, "stop": stop},
            model={"backend": backend, "out_channels": 3 if "em" in name[:2] else 1}
            | form_of(name, form),
            patch=patch,
            block={"shape": block},
            output={"volume": "out.zarr", "domain": "roi"},
            compute={"device": "cpu", "threads": 1},
        )
        assert run_on(SerialCommunicator(), config) == 0
        outputs[backend, form] = read_volume(folder / "out.zarr")
    reference = outputs["pytorch", "script"]
    assert reference.std() > 0.01
    for found in outputs.values():
        np.testing.assert_allclose(found, reference, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_network_of_two_channels_runs_whole(tmp_path, real_data, form_of):
    """FFN's network: an image, scaled as it was trained, and logits of a seed beside it."""
    need("openvino")
    with h5py.File(real_data / EM["volume"]) as file:
        image = np.asarray(file["image"][100:133, 100:133, 100:150], np.float32)
    seed = np.full(image.shape, -2.944, np.float32)
    seed[16, 16, 25] = 2.944
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["data"] = np.stack([(image - 128) / 33, seed])
    outputs = []
    for backend, form in (("pytorch", "script"), ("openvino", "pt2")):
        folder = tmp_path / f"{backend}-{form}"
        config = write_config(
            folder,
            input={"volume": str(tmp_path / "in.h5"), "dataset": "data"},
            model={"backend": backend} | form_of("ffn_fib25_convstack", form),
            patch={"shape": [33, 33, 33], "overlap": [8, 8, 8]},
            block={"shape": [33, 33, 42]},
            output={"volume": "out.zarr"},
            compute={"device": "cpu", "threads": 1},
        )
        assert run_on(SerialCommunicator(), config) == 0
        outputs.append(read_volume(folder / "out.zarr"))
    assert outputs[0].std() > 0.01
    for found in outputs[1:]:
        np.testing.assert_allclose(found, outputs[0], rtol=0, atol=1e-4)
