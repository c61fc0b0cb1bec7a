"""chunkflow's model files, and checkpoints of many kinds, some of them with code."""

import logging
import pickle
from functools import partial

import pytest
import torch

from mpichunk.errors import ModelError
from mpichunk.filehash import file_hash
from tests.engines import load_engine
from tests.torchnet import BATCH, NET_PY, Payload, expected, make_net


@pytest.fixture
def logged(caplog, monkeypatch):
    """Return the log, also after a run in this process that took it off the root."""
    monkeypatch.setattr(logging.getLogger("mpichunk"), "propagate", True)
    caplog.set_level(logging.INFO, logger="mpichunk")
    return caplog


load = partial(load_engine, "pytorch")


# ---- chunkflow's model files ---------------------------------------------------------------------

CHUNKFLOW_PY = (
    NET_PY
    + """
def pre_process(patch):
    assert type(patch).__name__ == "ndarray" and patch.ndim == 5
    patch *= 2  # in place, as they do
    return {"x": torch.from_numpy(patch)}

def post_process(output):
    extra = torch.zeros_like(output[0])
    return torch.cat([output[0].sigmoid(), extra], dim=1)

class Dicts(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()
    def forward(self, inputs):
        return [self.net(inputs["x"])]

InstantiatedModel = Dicts()

def load_model(weight_path):
    model = Dicts()
    model.net.load_state_dict(torch.load(weight_path)["weights"])
    return model
"""
)

UNIVERSAL_PY = """
from pathlib import Path
import numpy as np

class PatchInferencer:
    def __init__(self, weight_path, output_patch_mask):
        self.scale = float(Path(weight_path).read_text())
        self.mask = output_patch_mask
    def __call__(self, input_patch):
        assert isinstance(input_patch, np.ndarray) and input_patch.ndim == 5
        output = np.concatenate([input_patch, input_patch * self.scale], axis=1)
        return output[:, :, 1:-1, 1:-1, 1:-1] * self.mask
"""


@pytest.fixture
def folder(tmp_path):
    net = make_net()
    (tmp_path / "plain.py").write_text(NET_PY)
    (tmp_path / "model.py").write_text(CHUNKFLOW_PY)
    (tmp_path / "universal.py").write_text(UNIVERSAL_PY)
    (tmp_path / "scale.txt").write_text("3")
    torch.save({"weights": net.state_dict()}, tmp_path / "own.pt")
    nested = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": nested}, tmp_path / "nested.pt")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    return tmp_path


def test_chunkflow_network_of_the_file(folder):
    engine = load(f"{folder}/plain.py:InstantiatedModel", weights=f"{folder}/net.pt")
    torch.testing.assert_close(engine.infer(BATCH), expected())


@pytest.mark.parametrize(
    ("name", "weights"), [("InstantiatedModel", "nested.pt"), ("load_model", "own.pt")]
)
def test_chunkflow_functions_around_the_network(folder, name, weights):
    """The network is in eval mode, takes batches, and more channels than wanted are left out."""
    engine = load(f"{folder}/model.py:{name}", weights=f"{folder}/{weights}")
    with torch.no_grad():
        wanted = make_net()(BATCH * 2).sigmoid()
    before = BATCH.clone()
    torch.testing.assert_close(engine.infer(BATCH), wanted)
    torch.testing.assert_close(BATCH, before)


def test_chunkflow_universal_inferencer(folder):
    engine = load(
        f"{folder}/universal.py:PatchInferencer",
        weights=f"{folder}/scale.txt",
        changes={"crop": (1, 1, 1)},
    )
    wanted = torch.cat([BATCH, BATCH * 3], dim=1)[:, :, 1:-1, 1:-1, 1:-1]
    torch.testing.assert_close(engine.infer(BATCH), wanted)


def test_chunkflow_network_without_weights_is_refused(folder):
    with pytest.raises(ModelError, match="are random"):
        load(f"{folder}/model.py:InstantiatedModel")
    with pytest.raises(ModelError, match=r"load_model of .* cannot load None") as caught:
        load(f"{folder}/model.py:load_model")
    assert caught.value.key == "model.weights"


# ---- Checkpoints ---------------------------------------------------------------------------------


class Config:
    """Stands for what training code keeps beside the weights."""

    def __init__(self) -> None:
        self.learning_rate = 1.0


@pytest.fixture
def checkpoints(folder):
    net, other = make_net(), make_net()
    with torch.no_grad():
        other.first.weight *= 2
    state, better = net.state_dict(), other.state_dict()
    averaged = torch.optim.swa_utils.AveragedModel(net)
    torch.save({"ema": averaged.state_dict(), "step": 3}, folder / "ema.pt")
    torch.save({"state_dict": state, "ema": better}, folder / "both.pt")
    torch.save({"weights": {"net": state}}, folder / "deep.pt")
    torch.save({"state_dict": state, "config": Config()}, folder / "code.pt")
    torch.save(net.first, folder / "module.pt")
    (folder / "plain_pickle.pt").write_bytes(pickle.dumps(Payload(folder / "ran")))
    return folder


def load_plain(folder, weights, **keys):
    return load(f"{folder}/plain.py:Net", weights=f"{folder}/{weights}", **keys).infer(BATCH)


def test_averaged_weights(checkpoints):
    torch.testing.assert_close(load_plain(checkpoints, "ema.pt"), expected())


def test_of_several_weights_the_first_is_taken_and_said(checkpoints, logged):
    torch.testing.assert_close(load_plain(checkpoints, "both.pt"), expected())
    assert "took 'state_dict'" in logged.text and "{weights_key: ema}" in logged.text
    found = load_plain(checkpoints, "both.pt", options={"weights_key": "ema"})
    assert not torch.allclose(found, expected())


def test_a_key_that_is_not_there_and_an_option_that_is_unknown(checkpoints):
    with pytest.raises(ModelError, match=r"names with tensors, below 'averaged'"):
        load_plain(checkpoints, "both.pt", options={"weights_key": "averaged"})
    with pytest.raises(ModelError, match="no option 'weight_key'") as caught:
        load_plain(checkpoints, "both.pt", options={"weight_key": "ema"})
    assert caught.value.key == "model.options"


def test_only_a_trusted_checkpoint_runs_code(checkpoints):
    with pytest.raises(ModelError, match=r"would run .*Config.*model\.trust_pickle: true"):
        load_plain(checkpoints, "code.pt")
    found = load_plain(checkpoints, "code.pt", trust_pickle=True)
    torch.testing.assert_close(found, expected())
    with pytest.raises(ModelError):
        load_plain(checkpoints, "plain_pickle.pt")
    assert not (checkpoints / "ran").exists()
    # A whole module is its weights; here those of another network.
    with pytest.raises(ModelError, match="does not fit the network"):
        load_plain(checkpoints, "module.pt", trust_pickle=True)


def test_the_log_names_the_code_that_is_executed(folder, logged):
    load(f"{folder}/plain.py:Net", weights=f"{folder}/net.pt")
    lines = [r.message for r in logged.records if r.message.startswith("executing ")]
    path = folder / "plain.py"
    assert lines == [f"executing {path}, SHA-256 {file_hash(path)}"]


def test_torchscript_is_called_deprecated_once(tmp_path, logged):
    torch.jit.trace(make_net(), BATCH).save(tmp_path / "net.pt")
    engine = load(tmp_path / "net.pt")
    for _ in range(2):
        torch.testing.assert_close(engine.infer(BATCH), expected())
    assert len([r for r in logged.records if "deprecated" in r.message]) == 1
