"""The same model file, weights and chunk through chunkflow 1.2.0 and through mpichunk.

Opt-in, since chunkflow brings libraries of its own: `MPICHUNK_CHUNKFLOW=/environment/bin/python`.
Compared is what chunkflow keeps of a chunk by default: what lies an overlap away from its faces.
Closer to them its windows end at a millionth of their maximum, and those here at that per axis.
"""

import os
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpichunk.nets import em_affinity_resunet
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.verbs.run import run_on
from mpichunk.volume.synthetic import Membranes
from tests.endtoend import read_volume, write_config

CHUNKFLOW = os.environ.get("MPICHUNK_CHUNKFLOW")

MODEL_PY = f"""
import importlib.util
import torch

spec = importlib.util.spec_from_file_location("em_net", {em_affinity_resunet.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

InstantiatedModel = module.EmAffinityResUNet()
InstantiatedModel.eval()  # mpichunk does this by itself

def pre_process(patch):
    return {{"image": torch.from_numpy(patch)}}

class Named(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, inputs):
        return [self.net(inputs["image"])]

def post_process(output):
    return output[0]

def load_model(weight_path):
    InstantiatedModel.load_state_dict(torch.load(weight_path))
    return Named(InstantiatedModel).eval()
"""

UNIVERSAL_PY = """
import numpy as np
import torch

class PatchInferencer:
    def __init__(self, weight_path, output_patch_mask):
        torch.set_num_threads(1)
        self.model = module.EmAffinityResUNet().eval()
        self.model.load_state_dict(torch.load(weight_path))
        self.mask = output_patch_mask
    def __call__(self, patch):
        with torch.no_grad():
            return self.model(torch.from_numpy(patch)).numpy() * self.mask
"""

RUN_CHUNKFLOW = """
import sys
import h5py
import numpy as np
import torch
from chunkflow.chunk import Chunk
from chunkflow.flow.divid_conquer.inferencer import Inferencer

torch.set_num_threads(1)
folder, framework, *numbers = sys.argv[1:]
patch, overlap = (tuple(map(int, n.split(","))) for n in numbers)
with h5py.File(f"{folder}/in.h5") as file:
    image = np.asarray(file["main"])
inferencer = Inferencer(
    f"{folder}/model.py", f"{folder}/weights.pt", patch, num_output_channels=3,
    output_patch_overlap=overlap, framework=framework, dtype="float32",
)
np.save(f"{folder}/chunkflow.npy", np.asarray(inferencer(Chunk(image)).array))
"""


@pytest.mark.parametrize(
    ("framework", "name"), [("pytorch", "load_model"), ("universal", "PatchInferencer")]
)
def test_same_values_as_chunkflow(tmp_path, framework, name):
    if CHUNKFLOW is None:
        pytest.skip("no chunkflow (MPICHUNK_CHUNKFLOW names the python of its environment)")
    import torch
    from safetensors.torch import load_file

    overlap, patch = (8, 12, 16), (24, 28, 40)
    # Two or three patches per axis, which end where the volume does.
    shape = tuple(n + k * (n - o) for n, o, k in zip(patch, overlap, (1, 2, 1), strict=True))
    volume = Membranes(shape=shape, seed=3)
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["main"] = volume.image(volume.domain)
    code = MODEL_PY if framework == "pytorch" else MODEL_PY.partition("Instan")[0] + UNIVERSAL_PY
    (tmp_path / "model.py").write_text(code)
    weights = load_file(Path(em_affinity_resunet.__file__).with_suffix(".safetensors"))
    torch.save(weights, tmp_path / "weights.pt")

    numbers = [",".join(map(str, values)) for values in (patch, overlap)]
    command = [CHUNKFLOW, "-c", RUN_CHUNKFLOW, str(tmp_path), framework, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = np.load(tmp_path / "chunkflow.npy")

    torch.set_num_threads(1)
    config = write_config(
        tmp_path,
        input={"volume": "in.h5", "dataset": "main"},
        model={
            "backend": "pytorch",
            "path": f"model.py:{name}",
            "weights": "weights.pt",
            "out_channels": 3,
        },
        patch={"shape": list(patch), "overlap": list(overlap)},
        block={"shape": list(shape), "margin": [0, 0, 0]},
        output={"volume": "out.zarr"},
        compute={"device": "cpu", "threads": 1},
    )
    assert run_on(SerialCommunicator(), config) == 0
    found = read_volume(tmp_path / "out.zarr")
    kept = (slice(None), *(slice(n, -n) for n in overlap))
    found, expected = found[kept], expected[kept]
    assert expected.std() > 0.1
    print(f"{framework}: largest difference {np.abs(found - expected).max():.2g}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
