"""What tests of packages that describe their network share: configs, runs, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpichunk.config.file import LoadedConfig, load_config
from mpichunk.errors import ConfigError
from mpichunk.ranks.comm import SerialCommunicator
from mpichunk.rundir import journal
from mpichunk.verbs.run import run_on
from tests.endtoend import assert_same_files, write_config

VOLUME = {"volume": "synthetic://membranes?shape=16,32,40&seed=3"}


def config_file(folder: Path, model: Any, *, name: str = "config.yaml", **sections: Any) -> Path:
    """Write a config around a model; what a section lacks has a default."""
    config: dict[str, Any] = {
        "input": VOLUME,
        "model": {"backend": "pytorch"} | model,
        "patch": {"shape": [16, 24, 24]},
        "block": {"shape": [16, 24, 24]},
        "output": {"volume": f"{Path(name).stem}.zarr", "chunk_shape": [8, 24, 24]},
        "compute": {"device": "cpu", "threads": 1},
    }
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    return write_config(folder, name=name, **config)


def run(path: Path) -> Path:
    """Run a config; return where its output is."""
    assert run_on(SerialCommunicator(), path) == 0
    return path.with_suffix(".zarr")


def fingerprint(path: Path) -> dict[str, Any]:
    text = (path.parent / "runs" / path.stem / journal.NAME).read_text()
    parts: dict[str, Any] = json.loads(text.splitlines()[0])["fingerprint"]["parts"]
    return {key: value for key, value in parts.items() if key != "output.volume"}


def assert_same_runs(found: Path, plain: Path) -> None:
    """Run two configs: they must be one run in all that counts, and write the same bytes."""
    assert_same_files(run(found), run(plain))
    assert fingerprint(found) == fingerprint(plain)


def problems_of(path: Path) -> list[str]:
    """Return what is wrong with a config, without its file and line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return [line.partition(": ")[2] for line in caught.value.lines]


def plain_values(loaded: LoadedConfig) -> dict[str, Any]:
    model, config = loaded.config.model, loaded.config
    return {
        "normalize": config.input.normalize and config.input.normalize.model_dump(),
        "activation": model.activation,
        "threshold": config.output.threshold,
        "reduce": config.output.reduce,
        "crop": config.patch.crop,
        "channels": model.out_channels,
    }
