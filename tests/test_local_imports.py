"""Python files that a network's own file imports from beside it are part of the network."""

import subprocess
import sys
from pathlib import Path

import pytest

from mpichunk.backends.files.local_imports import imported_files
from mpichunk.config.file import load_config
from mpichunk.job.startup import fingerprint_of, prepare
from mpichunk.plan.fingerprint import differences
from tests.endtoend import write_config

FILES = {
    "net.py": """
import os, layers
from parts.deep import tail
def Net():
    from late import thing
    return layers, tail, thing
""",
    "layers.py": "from torch import nn\nimport numpy as np\nimport parts\n",
    "late.py": "import net\nimport nowhere.at_all\nthing = 1\n",
    "parts/__init__.py": "from .. import outside\n",
    "parts/deep/__init__.py": "from . import tail\nfrom .tail import x\n",
    "parts/deep/tail.py": "from ..side import y\nx = 1\n",
    "parts/side.py": "y = 1\n",
    "parts/unused.py": "",
    "unused.py": "",
    "os.txt": "",
}
USED = [
    "late.py",
    "layers.py",
    "parts/__init__.py",
    "parts/deep/__init__.py",
    "parts/deep/tail.py",
    "parts/side.py",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "outside.py").write_text("")
    return tmp_path / "model"


def test_imports_of_imports_within_the_folder_and_no_others(folder: Path) -> None:
    found = imported_files(folder / "net.py")
    assert [str(path.relative_to(folder)) for path in found] == USED


def test_they_are_those_that_python_executes(folder: Path) -> None:
    (folder / "parts/__init__.py").write_text("")
    (folder / "late.py").write_text("thing = 1\n")
    (folder / "layers.py").write_text("import parts\n")
    code = (
        "import sys; sys.path.append('.'); import net; net.Net(); print(*sorted("
        "m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    here = [p for p in map(Path, done.stdout.split()) if folder in p.resolve().parents]
    executed = {str(path.resolve().relative_to(folder)) for path in here} - {"net.py"}
    found = imported_files(folder / "net.py")
    assert {str(path.relative_to(folder)) for path in found} == executed


def test_files_that_are_no_python_are_left_to_whoever_executes_them(folder: Path) -> None:
    (folder / "layers.py").write_bytes(b"import parts\ndef \xff\x00")
    names = [str(path.relative_to(folder)) for path in imported_files(folder / "net.py")]
    assert names == USED


def test_a_changed_helper_is_another_run(tmp_path: Path, folder: Path) -> None:
    path = write_config(
        tmp_path,
        input={"volume": "synthetic://membranes?shape=16,16,16&seed=3"},
        model={"backend": "pytorch", "path": "model/net.py:Net"},
        patch={"shape": [8, 8, 8]},
        block={"shape": [16, 16, 16]},
        output={"volume": "out.zarr"},
    )

    def parts() -> dict[str, object]:
        return fingerprint_of(prepare(load_config(path).config), device_kinds=["cpu"], threads=1)

    before = parts()
    (folder / "unused.py").write_text("changed = 1\n")
    assert parts() == before
    (folder / "parts/side.py").write_text("y = 2\n")
    (line,) = differences(before, parts())
    assert line.startswith("model.files.6:side.py: ")
