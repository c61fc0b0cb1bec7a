"""Networks named by a bioimage.io package: the same run as the config in full."""

import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpichunk.cli import main
from mpichunk.config.file import load_config
from tests.described import assert_same_runs, config_file, fingerprint, problems_of, run
from tests.endtoend import read_volume
from tests.optional import need
from tests.packages import BY_255, em_package, points_package

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", ["torchscript", "pytorch_state_dict"])
def test_package_runs_as_the_plain_config(
    tmp_path: Path, form: str, zoo: None, capsys: pytest.CaptureFixture[str]
) -> None:
    package = em_package(tmp_path / "net", form, halo=[2, 4, 4])
    plain: dict[str, Any] = {"out_channels": 3, "path": "net/net.ts.pt"}
    if form == "pytorch_state_dict":
        plain["path"] = "net/net.py:EmAffinityResUNet"
        plain |= {"weights": "net/weights.pt", "arguments": {"padding": "same"}}
    normalize = {"subtract": 0, "divide": 255}
    assert_same_runs(
        config_file(tmp_path, {"path": "net"}),
        config_file(
            tmp_path,
            plain,
            name="plain.yaml",
            input={"normalize": normalize},
            patch={"crop": [2, 4, 4]},
        ),
    )
    assert f"the bioimage.io package {package}/rdf.yaml: model.path: " in capsys.readouterr().err
    path = str(tmp_path / "config.yaml")
    for verb in (["verify"], ["status", "--check"]):
        assert main([*verb, path]) == 0
    # The run's own config names no package, and starts the same run.
    effective = tmp_path / "runs/config/config.yaml"
    (package / "rdf.yaml").unlink()
    assert load_config(effective).config.patch.crop == (2, 4, 4)
    assert "rdf.yaml" not in effective.read_text()


def test_network_that_loses_its_border(tmp_path: Path, zoo: None) -> None:
    package = em_package(
        tmp_path / "net", "torchscript", padding="valid", size={"min": 46, "step": 4}, offset=-42
    )
    # The description itself may be named, too.
    geometry = {"shape": [58, 58, 66], "overlap": [0, 0, 0]}
    found = config_file(tmp_path, {"path": str(package / "rdf.yaml")}, patch=geometry)
    plain = config_file(
        tmp_path,
        {"path": "net/net.ts.pt", "out_channels": 3},
        name="plain.yaml",
        input={"normalize": {"divide": 255}},
        patch=geometry | {"crop": [21, 21, 21]},
    )
    assert_same_runs(found, plain)
    path = config_file(tmp_path, {"path": "net"}, patch={"shape": [48, 50, 53]})
    (problem,) = problems_of(path)
    assert problem == (
        f"patch.shape: [48, 50, 53] does not fit the bioimage.io package {package}/rdf.yaml: "
        "z = 46 + n * 4, y = 46 + n * 4, x = 46 + n * 4; the nearest is [46, 50, 54]"
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines_take_what_they_can_of_a_package(tmp_path: Path, backend: str, zoo: None) -> None:
    need(backend)
    points_package(tmp_path / "net", before=BY_255, after=[{"id": "sigmoid"}])
    torch_path = run(config_file(tmp_path, {"path": "net"}, name="torch.yaml"))
    path = config_file(tmp_path, {"path": "net", "backend": backend})
    assert load_config(path).config.model.path == str(tmp_path / "net/net.onnx")
    expected = read_volume(torch_path)
    np.testing.assert_allclose(read_volume(run(path)), expected, atol=1e-4)
    assert expected.std() > 0.05


def test_zipped_package(tmp_path: Path, zoo: None) -> None:
    package = em_package(tmp_path / "net", "pytorch_state_dict")
    shutil.make_archive(str(tmp_path / "net"), "zip", package)
    zipped = config_file(tmp_path, {"path": "net.zip"})
    plain = config_file(tmp_path, {"path": "net"}, name="plain.yaml")
    expected = load_config(plain).config.model
    shutil.rmtree(package)
    model = load_config(zipped).config.model
    folder = Path(str(model.weights)).parent
    assert folder.parent == tmp_path / "runs/config"
    assert model.model_dump() == expected.model_dump() | {
        "path": f"{folder}/net.py:EmAffinityResUNet",
        "weights": f"{folder}/weights.pt",
    }
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    run(zipped)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.glob("model-*")] == [folder.name]
    # Where the archive was unpacked is no part of what was computed; which archive it was, is.
    parts = fingerprint(zipped)
    assert parts["model.path"] == f"{folder.name}/net.py:EmAffinityResUNet"
    assert parts["model.weights"] == f"{folder.name}/weights.pt"
    run(config_file(tmp_path, {"path": "net.zip"}, name="elsewhere.yaml"))
    assert fingerprint(tmp_path / "elsewhere.yaml") == parts


@pytest.mark.parametrize(
    "name", ["../escaped.txt", "/tmp/mpichunk-escaped.txt", "a/../../b", "link"]
)
def test_archive_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "net.zip", "w") as archive:
        archive.writestr("rdf.yaml", "type: model")
        member = zipfile.ZipInfo(name)
        if name == "link":
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    (problem,) = problems_of(config_file(tmp_path, {"path": "net.zip"}))
    assert f"has a member {name!r}" in problem and "it is not unpacked" in problem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "net.zip"]
