"""What the pytorch backend loads besides TorchScript and plain classes, and what it refuses to run.

Files of torch.export, chunkflow's model files, checkpoints of many kinds, pickles with code.
"""

import json
import logging
import pickle
import shutil
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpichunk.backends.exported_archive import strange_parts
from mpichunk.block.inference import check_engine
from mpichunk.errors import ModelError
from mpichunk.filehash import file_hash
from tests.engines import load_engine, make_request

NET_PY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.first = nn.Conv3d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm3d(width)
        self.drop = nn.Dropout(0.5)
    def forward(self, x):
        return self.drop(self.norm(self.first(x)))

InstantiatedModel = Net()
"""


def make_net() -> nn.Module:
    namespace: dict[str, type[nn.Module]] = {}
    exec(NET_PY, namespace)
    torch.manual_seed(1)
    net = namespace["Net"]()
    with torch.no_grad():
        net.norm.running_mean += 0.3
    return net.eval()


@pytest.fixture
def logged(caplog, monkeypatch):
    """Return the log, also after a run in this process that took it off the root."""
    monkeypatch.setattr(logging.getLogger("mpichunk"), "propagate", True)
    caplog.set_level(logging.INFO, logger="mpichunk")
    return caplog


BATCH = torch.rand(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5))


load = partial(load_engine, "pytorch")


def expected() -> torch.Tensor:
    with torch.no_grad():
        return make_net()(BATCH)


# ---- torch.export --------------------------------------------------------------------------------


def export(net: nn.Module, path: Path, shape=(2, 1, 4, 8, 8), *, axes=(0, 2, 3, 4)) -> Path:
    dynamic = ({axis: torch.export.Dim.AUTO for axis in axes},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (torch.zeros(shape),), dynamic_shapes=dynamic)
        torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the file of a network that takes any batch and any patch."""
    return export(make_net(), tmp_path_factory.mktemp("exported") / "net.pt2")


def rewrite(source: Path, target: Path, change) -> Path:
    """Copy an archive; `change` gets name and bytes of each member, and returns its new bytes."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def rewrite_network(source: Path, target: Path, change) -> Path:
    """Copy an archive; `change` alters the description of the network in place."""

    def alter(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        network = json.loads(data)
        change(network)
        return json.dumps(network).encode()

    return rewrite(source, target, alter)


def test_exported_network_for_any_shape(exported):
    engine = load(exported)
    torch.testing.assert_close(engine.infer(BATCH), expected())
    torch.testing.assert_close(engine.infer(BATCH[:1]), expected()[:1])
    changes = {"patch_shape": (6, 10, 4), "batch_size": 3}
    check_engine(load(exported, changes=changes), make_request(**changes))


def test_weights_of_a_file_replace_those_of_an_exported_network(exported, tmp_path):
    other = make_net()
    with torch.no_grad():
        other.first.weight *= 2
    torch.save(other.state_dict(), tmp_path / "w.pt")
    with torch.no_grad():
        wanted = other(BATCH)
    found = load(exported, weights=str(tmp_path / "w.pt")).infer(BATCH)
    torch.testing.assert_close(found, wanted)


def test_exported_for_one_shape_only(tmp_path):
    path = export(make_net(), tmp_path / "fixed.pt2", axes=())
    torch.testing.assert_close(load(path).infer(BATCH), expected())
    for changes, key, words in (
        ({"patch_shape": (4, 8, 10)}, "patch.shape", "patches of [4, 8, 8] only"),
        ({"batch_size": 1}, "patch.batch_size", "set patch.batch_size: 2"),
        ({"in_channels": 2}, "model.path", "takes 1 input channels, but the input has 2"),
    ):
        with pytest.raises(ModelError) as caught:
            load(path, changes=changes)
        assert caught.value.key == key
        assert words in str(caught.value)


def test_exported_in_training_mode_is_refused(tmp_path):
    path = export(make_net().train(), tmp_path / "train.pt2", axes=())
    with pytest.raises(ModelError, match=r"exported in training mode .* call eval\(\)"):
        load(path)


def test_exported_by_a_newer_torch(exported, tmp_path):
    def change(network):
        network["schema_version"]["major"] += 1
        network["torch_version"] = "9.9.0"

    path = rewrite_network(exported, tmp_path / "newer.pt2", change)
    with pytest.raises(ModelError, match=r"exported by another torch \(9\.9\.0, schema") as caught:
        load(path)
    assert caught.value.key == "model.path"
    assert "\n" not in str(caught.value)


def test_exported_file_that_is_cut_short(exported, tmp_path):
    data = exported.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cut short"):
        load(tmp_path / "cut.pt2")

    def empty_description(name: str, data: bytes) -> bytes:
        return data[:100] if name.endswith("model.json") else data

    path = rewrite(exported, tmp_path / "bad.pt2", empty_description)
    with pytest.raises(ModelError, match="damaged or cut short"):
        load(path)


CODE = "__import__('pathlib').Path({path!r}).write_text('ran')"


def insert_guard(network, code):
    network["guards_code"].append(f"{code} is not None")


def insert_expression(network, code):
    for value in network["graph_module"]["graph"]["tensor_values"].values():
        for size in value["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = code
                return


def insert_target(network, code):
    network["graph_module"]["graph"]["nodes"][-1]["target"] = "torch.hub.os.system"


def insert_name(network, code):
    network["graph_module"]["graph"]["nodes"][-1]["name"] = f"x\n    {code}\n"


@pytest.mark.parametrize("insert", [insert_guard, insert_expression, insert_target, insert_name])
def test_exported_file_that_would_run_code_is_refused(exported, tmp_path, insert):
    """torch makes Python of what such a file says; see also the next test."""
    ran = tmp_path / "ran"
    code = CODE.format(path=str(ran))
    path = rewrite_network(exported, tmp_path / "bad.pt2", lambda n: insert(n, code))
    assert strange_parts(path) and not strange_parts(exported)
    with pytest.raises(ModelError, match="more than tensor operations") as caught:
        load(path)
    assert "model.trust_pickle: true" in str(caught.value)
    assert not ran.exists()


def test_a_guard_of_an_exported_file_would_really_run(exported, tmp_path):
    ran = tmp_path / "ran"
    code = CODE.format(path=str(ran))
    path = rewrite_network(exported, tmp_path / "bad.pt2", lambda n: insert_guard(n, code))
    load(path, trust_pickle=True).infer(BATCH)
    assert ran.read_text() == "ran"


NETWORK = "models/model.json"


@pytest.mark.parametrize(
    ("member", "is_first"),
    [
        ("models/sub/model.json", False),
        ("models/model.jsox", False),
        ("Models/model.json", True),
        ("Models/model.json", False),
        (NETWORK, True),
        (NETWORK, False),
        ("data/executorch/model.pte", False),
        ("data/constants/custom_obj_0", False),
        ("data/aotinductor/model/x.so", False),
        ("../models/model.json", False),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_exported_file_with_another_member_is_refused(
    exported, tmp_path, monkeypatch, member, is_first
):
    """torch deserialises all below models/, finds names in any case, and runs compiled code."""
    ran = tmp_path / "ran"
    path = tmp_path / "bad.pt2"
    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(path, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        root = old.namelist()[0].partition("/")[0]
        network = json.loads(members[f"{root}/{NETWORK}"])
        insert_guard(network, CODE.format(path=str(ran)))
        insert_expression(network, CODE.format(path=str(ran)))
        bad = f"{root}/{member}", json.dumps(network)
        if is_first:
            new.writestr(*bad)
        for name, data in members.items():
            new.writestr(name, data)
            if name.startswith(f"{root}/data/"):  # what torch looks for beside models/sub/
                folder, _, file = name.rpartition("/")
                if "sub" in member:
                    new.writestr(f"{folder}/sub/{file}", data)
        if not is_first:
            new.writestr(*bad)
    assert strange_parts(path) and not strange_parts(exported)
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("torch read it"))
    words = "more than tensor operations|compiled for one machine"
    with pytest.raises(ModelError, match=words) as caught:
        load(path)
    assert caught.value.key == "model.path"
    assert not ran.exists()


def test_exported_file_with_another_root_is_refused(exported, tmp_path):
    path = tmp_path / "bad.pt2"
    shutil.copy(exported, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("version", "1")
    assert strange_parts(path) == ["version"]


def test_torch_reads_the_members_that_were_looked_at(exported, tmp_path):
    """Python skips bytes before an archive; another reader may find another directory there."""
    path = tmp_path / "net.pt2"
    path.write_bytes(b"x" * 100 + exported.read_bytes())
    torch.testing.assert_close(load(path).infer(BATCH), expected())


class Payload:
    """Stands for code in a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "ran"))


def test_a_pickle_within_an_exported_file_does_not_run(exported, tmp_path):
    ran = tmp_path / "ran"
    torch.save({"x": Payload(ran)}, tmp_path / "payload.pt")
    payload = (tmp_path / "payload.pt").read_bytes()

    def change(name: str, data: bytes) -> bytes:
        return payload if "sample_inputs" in name else data

    path = rewrite(exported, tmp_path / "bad.pt2", change)
    with pytest.raises(ModelError, match="must not run code") as caught:
        load(path)
    assert "model.trust_pickle: true" in str(caught.value)
    assert not ran.exists()


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


def test_an_archive_of_another_kind_is_named(tmp_path, exported):
    def rename(part: str, other: str) -> Path:
        path = tmp_path / "net.pt2"
        with zipfile.ZipFile(exported) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name.replace(part, other), old.read(name))
        return path

    with pytest.raises(ModelError, match="compiled for one machine"):
        load(rename("models/", "data/aotinductor/model/"))
    shutil.copy(exported, tmp_path / "renamed.pt")  # what it is, not what it is called
    np.testing.assert_allclose(load(tmp_path / "renamed.pt").infer(BATCH), expected(), atol=1e-6)
