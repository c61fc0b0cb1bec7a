"""Files of torch.export: what the pytorch backend loads of them, and what it refuses to run."""

import json
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mpichunk.backends.pytorch.exported_archive import strange_parts
from mpichunk.block.inference import check_engine
from mpichunk.errors import ModelError
from tests.engines import load_engine, make_request
from tests.torchnet import BATCH, Payload, expected, export, make_net

load = partial(load_engine, "pytorch")


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
        ({"in_channels": 2}, "model.path", "takes 1 input channel, but the input has 2"),
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
