"""The smallest config, as values and as a file: changed, loaded, refused."""

from pathlib import Path
from typing import Any

import pytest

from mpichunk.config.checks import check
from mpichunk.config.file import LoadedConfig, load_config
from mpichunk.config.rules import find_warnings
from mpichunk.config.schema import Config, flatten
from mpichunk.errors import ConfigError

Values = dict[str, Any]

MINIMAL: Values = {
    "input": {"volume": "/data/em"},
    "model": {"backend": "identity"},
    "patch": {"shape": [20, 256, 256]},
    "block": {"shape": [128, 1152, 1152]},
    "output": {"volume": "/out/pred.zarr"},
    "run_dir": "/runs/pred",
}


def changed(changes: Values) -> Values:
    """Return the values of the minimal config with these dotted keys set."""
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in MINIMAL.items()}
    for key, value in changes.items():
        *parents, name = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return values


def config_with(changes: Values) -> Config:
    """Return the minimal config with these dotted keys set."""
    return Config.model_validate(changed(changes))


def warnings_of(config: Config) -> list[str]:
    """Return what has no effect in a config."""
    return [f"{p.key}: {p.message}" for p in find_warnings(flatten(config))]


def problems_of(values: Values) -> list[str]:
    """Return what is wrong with these values."""
    result = check(values)
    assert isinstance(result, list)
    return [f"{problem.key}: {problem.message}" for problem in result]


GOOD = """\
input:
  volume: data/em
model:
  backend: identity
patch:
  shape: [20, 256, 256]
block:
  shape: [128, 1152, 1152]
output:
  volume: out/pred.zarr
"""


def load(text: str, *overrides: str) -> LoadedConfig:
    """Load a file of this text, `config.yaml` in the working directory."""
    path = Path("config.yaml")
    path.write_text(text)
    return load_config(path, overrides)


def refusal(text: str, *overrides: str) -> list[str]:
    """Return what is wrong with a file of this text, one line each."""
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert len(caught.value.problems) == len(str(caught.value).splitlines())
    return str(caught.value).splitlines()


def good_with(old: str, new: str) -> str:
    """Return the text of the file with a part of it replaced."""
    assert old in GOOD
    return GOOD.replace(old, new)
