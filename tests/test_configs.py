"""The configs that ship: each is valid, and what the quickstart names is there."""

from pathlib import Path

import pytest

from mpichunk.config.file import load_config
from tests.launch import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_valid_and_fits_its_stride(path: Path) -> None:
    config = load_config(path).config
    stride = [q - o for q, o in zip(config.output_patch_shape, config.overlap, strict=True)]
    assert [b % s for b, s in zip(config.block.shape, stride, strict=True)] == [0, 0, 0]
    assert [b % u for b, u in zip(config.block.shape, config.write_unit, strict=True)] == [0, 0, 0]


@pytest.mark.parametrize("name", ["quickstart", "workstation"])
def test_shipped_network_is_where_the_config_says(name: str) -> None:
    model = load_config(REPOSITORY / f"configs/{name}.yaml").config.model
    assert Path(str(model.path).removesuffix(":EmAffinityResUNet")).is_file()
    assert Path(str(model.weights)).is_file()


def test_quickstart_writes_inside_the_folder_that_git_ignores() -> None:
    config = load_config(REPOSITORY / "configs/quickstart.yaml").config
    assert str(config.output.volume).find(str(REPOSITORY / "out")) >= 0
    assert Path(config.run_dir).is_relative_to(REPOSITORY / "out")
