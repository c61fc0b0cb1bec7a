"""Which instructions OpenVINO's convolutions may take; in processes of their own: it looks once."""

import json
import os

import numpy as np
import pytest

from mpichunk.backends.openvino.instructions import OPTION, limit_of, limited
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError
from tests import onnx_maker
from tests.launch import REPOSITORY

PROGRAM = """
import json, os, sys
import numpy as np
from mpichunk.backends import get_backend
from mpichunk.backends.engine import EngineRequest
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError

shape = 8, 16, 16
request = EngineRequest(
    patch_shape=shape, crop=(0, 0, 0), batch_size=1, in_channels=1, threads=1,
    out_channels=json.loads(sys.argv[1])["out_channels"],
    precision="float32", device="cpu", deterministic=True,
)
batch = np.random.default_rng(0).random((1, 1, *shape), dtype=np.float32)
for limit in sys.argv[2:]:
    options = {} if limit == "none" else {"ONEDNN_MAX_CPU_ISA": limit}
    model = Model(backend="openvino", options=options, **json.loads(sys.argv[1]))
    try:
        engine = get_backend("openvino").load(model, request)
    except ModelError as error:
        print(json.dumps({"refused": str(error)}))
        continue
    kernels = {
        str(op.get_rt_info()["primitiveType"].value)
        for op in engine._compiled.get_runtime_model().get_ops()
    }
    print(json.dumps({
        "values": engine.infer(batch).tolist(), "kernels": sorted(kernels), "how": engine.info.how,
        "is_set": "ONEDNN_MAX_CPU_ISA" in os.environ,
    }))
"""


NETS = str(REPOSITORY / "mpichunk/nets/em_affinity_resunet")
MODEL = {
    "path": f"{NETS}.py:EmAffinityResUNet",
    "weights": f"{NETS}.safetensors",
    "out_channels": 3,
}


def load_one_by_one(python, *limits, model=MODEL):
    pytest.importorskip("openvino", reason="no openvino: pip install 'mpichunk[openvino]'")
    env = {k: v for k, v in os.environ.items() if k != OPTION}
    done = python(
        "-c", PROGRAM, json.dumps(model), *limits, env={**env, "PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_no_wider_instructions_are_taken_and_values_stay(python):
    (narrow,) = load_one_by_one(python, "AVX2")
    (wide,) = load_one_by_one(python, "none")
    assert narrow["kernels"] and not [name for name in narrow["kernels"] if "avx512" in name]
    assert narrow["how"] == "float32, AVX2 at most" and wide["how"] == "float32"
    # torch, in the same process, is left alone.
    assert not narrow["is_set"]
    np.testing.assert_allclose(narrow["values"], wide["values"], atol=1e-5)


def test_a_network_that_is_not_converted_here_is_limited_too(python, tmp_path):
    """As on all ranks but one: nothing was compiled for a comparison before."""
    model = {"path": str(onnx_maker.convolution(tmp_path / "net.onnx")), "out_channels": 2}
    (narrow,) = load_one_by_one(python, "AVX2", model=model)
    assert "refused" not in narrow
    assert not [name for name in narrow["kernels"] if "avx512" in name]


def test_a_limit_that_comes_too_late_is_refused(python):
    wide, late = load_one_by_one(python, "none", "AVX2")
    if any("avx512" in name for name in wide["kernels"]):
        assert "looks once per process" in late["refused"]
    else:
        assert late["how"] == "float32, AVX2 at most"


def test_what_onednn_does_not_know_is_refused():
    model = Model(backend="openvino", path="n.xml", out_channels=1, options={OPTION: "AVX3"})
    with pytest.raises(ModelError, match="'AVX3'; expected AVX2 or AVX512_CORE") as caught:
        limit_of(model)
    assert caught.value.key == "model.options"


@pytest.mark.parametrize("before", [None, "AVX512_CORE"])
def test_the_environment_is_as_it_was(monkeypatch, before):
    monkeypatch.delenv(OPTION, raising=False)
    if before is not None:
        monkeypatch.setenv(OPTION, before)
    with limited("AVX2"):
        assert os.environ[OPTION] == "AVX2"
    with limited(None):
        assert os.environ.get(OPTION) == before
    assert os.environ.get(OPTION) == before
