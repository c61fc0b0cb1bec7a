"""What holds for every package that describes a network."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from mpichunk.cli import main
from mpichunk.config.file import load_config
from tests.described import config_file, problems_of, run
from tests.endtoend import trap
from tests.launch import Launch
from tests.optional import need
from tests.packages import BY_255, SIGMOID, points_bundle, points_package, unet_bundle, write_bundle

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", ["folder", "archive", "bundle"])
def test_verbs_that_look_at_a_run_read_no_package(
    tmp_path: Path,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not before the run has started, and not when it is there no more."""
    patch = {"shape": [16, 32, 32]}
    name = "net.zip" if form == "archive" else "net"
    path = config_file(tmp_path, {"path": name}, patch=patch)
    if form == "bundle":
        package = points_bundle(tmp_path / "net", inference={"postprocessing": SIGMOID})
    else:
        need("bioimageio.spec", extra="bioimageio")
        package = points_package(tmp_path / "net", before=BY_255, after=[{"id": "sigmoid"}])
        shutil.make_archive(str(tmp_path / "net"), "zip", package)

    def told(verb: str, *more: str) -> tuple[int, str]:
        code = main([*verb.split(), str(path), *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    for verb in ("status", "stop", "verify"):
        code, said = told(verb)
        assert code == 2 and "this config has not been run yet" in said
    code, said = told("status --check")
    assert code == 75 and "nothing is done yet" in said
    assert not (tmp_path / "runs").exists()
    run(path)
    capsys.readouterr()

    shutil.rmtree(package)
    (tmp_path / "net.zip").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "bioimageio", None)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for verb, expected in (
        ("status --check", "state    complete"),
        ("stop", "nothing to stop: complete"),
        ("verify", "complete and as it was written"),
    ):
        code, said = told(verb)
        assert code == 0 and expected in said, said
    for key, value in (
        ("input.normalize", "{divide: 7}"),
        ("model.out_channels", "3"),
        ("model.path", "another"),
    ):
        for verb in ("status", "verify"):
            code, said = told(verb, "--set", f"{key}={value}")
            assert code == 2 and key in said, said
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before

    (tmp_path / "runs/config/config.yaml").write_bytes(b"\xff")
    code, said = told("stop")
    assert code == 2 and "runs/config/config.yaml cannot be read" in said


def test_missing_packages_are_told_with_their_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points_package(tmp_path / "zoo")
    write_bundle(tmp_path / "bundle")
    torch.save({}, tmp_path / "bundle/models/model.pt")
    for name, package, extra in (
        ("zoo", "bioimageio.spec", "bioimageio"),
        ("bundle", "monai", "monai"),
    ):
        monkeypatch.setitem(sys.modules, extra, None)
        path = config_file(tmp_path, {"path": name}, patch={"shape": [16, 32, 32]})
        (problem,) = problems_of(path)
        assert f"needs the package {package}, which is not installed: pip install " in problem
        assert f"'mpichunk[{extra}]'" in problem


def test_plan_starts_neither_torch_nor_mpi(
    tmp_path: Path, python: Launch, zoo: None, monai: None
) -> None:
    points_package(tmp_path / "zoo")
    unet_bundle(tmp_path / "bundle")
    (tmp_path / "bundle/models/model.ts").unlink()
    environment = trap(tmp_path / "trap", "torch", "mpi4py")
    for name in ("zoo", "bundle"):
        path = config_file(tmp_path, {"path": name}, patch={"shape": [16, 32, 32]})
        done = python("-W", "error", "-m", "mpichunk", "plan", path, env=environment)
        assert done.returncode == 0, done.stderr
        assert "model.out_channels: 2" in done.stderr
        assert not (tmp_path / "runs").exists()


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    """A folder that is no package, and backends with folders of their own."""
    (tmp_path / "net").mkdir()
    for backend in ("pytorch", "pznet"):
        loaded = load_config(config_file(tmp_path, {"path": "net", "backend": backend}))
        assert loaded.config.model.path == str(tmp_path / "net") and loaded.notes == ()
    write_bundle(tmp_path / "net")
    loaded = load_config(config_file(tmp_path, {"path": "net", "backend": "identity"}))
    assert loaded.config.model.path == str(tmp_path / "net")
