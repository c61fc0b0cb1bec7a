"""A config file: read with every mistake at once and its line, and written back.

Brings YAML, the checks and the paths together. Knows no volume, no network and no run directory.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpichunk.config.checks import check
from mpichunk.config.described import follow, recall
from mpichunk.config.described.merging import Merged
from mpichunk.config.location import resolve_model_path, resolve_path, resolve_volume
from mpichunk.config.rules import find_problems, find_warnings
from mpichunk.config.schema import Config, flatten
from mpichunk.config.text import Document, parse, render
from mpichunk.errors import ConfigError, Problem, UserError

MAX_NBYTES = 1 << 20
"""No config is larger; what is larger is an image or a network given by mistake."""

_FOLLOWING = "patch.overlap", "block.margin", "output.chunk_shape"
"""Keys whose defaults follow from other values."""

_HEADER = """\
# The effective config of a run: every default written out, every path absolute.
# A copy of this file starts the same run.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the values of a config come from."""

    path: Path
    """The file, as the user named it."""

    lines: Mapping[str, int]
    """1-based line of each dotted key; those that `--set` replaced have none."""

    overrides: tuple[str, ...]
    """Dotted keys given with `--set`."""

    def locate(self, key: str) -> str:
        """Return "config.yaml:12: patch.overlap", or "--set patch.overlap" for what was overridden.

        A key that the file does not have gets the line of its nearest parent.
        """
        place = self._nearest(key)
        if isinstance(place, str):
            return f"--set {place}" + (f": {key}" if place != key else "")
        where = str(self.path) if place is None else f"{self.path}:{place}"
        return f"{where}: {key}" if key else where

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Put the line of its key, if it has one, before what a UserError tells."""
        try:
            yield
        except UserError as error:
            raise error if error.key is None else error.prefixed(self.locate(error.key)) from None

    def refuse(self, problems: Sequence[Problem]) -> ConfigError:
        """Return the error that names every problem, in the order of the file."""
        ordered = sorted(problems, key=self._order)
        return ConfigError(ordered, [f"{self.locate(p.key)}: {p.message}" for p in ordered])

    def _nearest(self, key: str) -> int | str | None:
        """Return the line of a key or its nearest parent, or the override that set it."""
        while key:
            if key in self.overrides:
                return key
            if key in self.lines:
                return self.lines[key]
            key = key.rpartition(".")[0]
        return None

    def _order(self, problem: Problem) -> tuple[int, int]:
        place = self._nearest(problem.key)
        if isinstance(place, str):
            return 1, self.overrides.index(place)
        return 0, place or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig(Source):
    """A checked config that remembers where its values come from."""

    config: Config
    """The effective config: defaults written out, paths absolute, no package left in it."""

    remarks: tuple[Problem, ...] = ()
    """What the user should know of values that a network's description speaks of, too."""

    notes: tuple[str, ...] = ()
    """What was taken from a description."""

    defaulted: frozenset[str] = frozenset()
    """Keys that were left open, and whose values follow from others."""

    def warnings(self) -> tuple[str, ...]:
        """Return a sentence for each value that has no effect or is doubtful, with its place."""
        found = (*self.remarks, *find_warnings(flatten(self.config)))
        return tuple(f"{self.locate(p.key)}: {p.message}" for p in found)


Describe = Callable[[Mapping[str, Any], str], Merged]
"""Completes a file's values by what is known of the package in `model.path`."""


def load_config(
    path: Path, overrides: Sequence[str] = (), *, describe: Describe = follow
) -> LoadedConfig:
    """Return the effective config of a file.

    Args:
        path: the YAML file; relative paths in it, and in `overrides`, start from its directory.
        overrides: `section.key=value`, the value in YAML; a later one wins.
        describe: replaces a package that `model.path` names by what it says.

    Raises:
        ConfigError: the file or an override is wrong; names every mistake with its line.
    """
    document = parse(_read(path), str(path))
    values, lines, problems = _sections(document, path), document.lines, document.problems
    keys: list[str] = []
    for override in overrides:
        key, value = _split_override(override)
        _set(values, key, value)
        lines = {k: v for k, v in lines.items() if k != key and not k.startswith(f"{key}.")}
        keys = [k for k in keys if k != key and not k.startswith(f"{key}.")] + [key]
    source = Source(path=path, lines=lines, overrides=tuple(keys))
    if values.get("run_dir") is None:
        values["run_dir"] = f"runs/{path.stem}"
    base = os.path.abspath(path.parent)
    with source.locating():
        described = describe(values, base)
    problems = [*problems, *described.problems]
    config = check(described.values)
    if isinstance(config, list):
        raise source.refuse([*problems, *config])
    given = flatten(config)
    defaulted = frozenset(key for key in _FOLLOWING if given[key] is None)
    config = _resolve(config, base).with_defaults()
    # Once more: only resolved paths tell whether the output is the input.
    problems = [*problems, *find_problems(flatten(config))]
    if problems:
        raise source.refuse(problems)
    return LoadedConfig(
        path=path,
        lines=lines,
        overrides=source.overrides,
        config=config,
        remarks=described.warnings,
        notes=described.notes,
        defaulted=defaulted,
    )


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Return the effective config of a file whose run may be under way, and read no package.

    For the verbs that look at a run: what reads a package may be missing where they are called, and
    nothing is unpacked for them.

    Raises:
        ConfigError: the file, an override or the run's own config is wrong.
        JournalError: a package is named, and what it says is not in the run directory.
    """
    return load_config(path, overrides, describe=recall)


def load_plain_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Return the effective config of a file as it is: a package stays a package.

    Raises:
        ConfigError: the file or an override is wrong, or lacks what only the package says.
    """
    return load_config(path, overrides, describe=lambda values, _: Merged(values=dict(values)))


def dump_config(config: Config) -> str:
    """Return YAML that `load_config` reads as an equal config, whatever directory it lies in.

    Args:
        config: an effective config, as `load_config` returns it.
    """
    return _HEADER + render(config.model_dump())


def json_schema() -> str:
    """Return the JSON schema of config files, for editors that check and complete."""
    schema = Config.model_json_schema()
    schema["required"].remove("run_dir")
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(dialect | schema, indent=2)


def _read(path: Path) -> str:
    """Return the text of a file that can be a config."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NBYTES + 1)
        if len(data) > MAX_NBYTES:
            raise _unreadable(path, "is larger than 1 MiB; a config is a short YAML file")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise _unreadable(path, "no such file; name the config, a YAML file") from None
    except IsADirectoryError:
        raise _unreadable(path, "is a directory; name the config, a YAML file") from None
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _unreadable(
            path, "is not a text file in UTF-8; name the config, a YAML file"
        ) from None


def _unreadable(path: Path, message: str) -> ConfigError:
    return ConfigError([Problem(key="", message=message)], [f"{path}: {message}"])


def _sections(document: Document, path: Path) -> dict[str, Any]:
    """Return the sections of a config file."""
    if isinstance(document.values, dict):
        return dict(document.values)
    required = ", ".join(
        f"`{name}`"
        for name, f in Config.model_fields.items()
        if f.is_required() and name != "run_dir"
    )
    found = "is empty" if document.values is None else "holds no sections"
    raise _unreadable(path, f"{found}; a config needs the sections {required}")


def _split_override(override: str) -> tuple[str, Any]:
    """Return the dotted key and the value of `section.key=value`."""
    key, equals, text = override.partition("=")
    key = key.strip()
    source = f"--set {key}"
    if not equals or not all(key.split(".")):
        message = "must be `--set section.key=value`, e.g. `--set patch.batch_size=2`"
        raise ConfigError([Problem(key=key, message=message)], [f"--set {override}: {message}"])
    document = parse(text, source)
    if document.problems:
        problems = document.problems
        raise ConfigError(problems, [f"{source}: {p.key}: {p.message}" for p in problems])
    return key, document.values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings, making the sections that it needs."""
    *parents, name = key.split(".")
    for depth, parent in enumerate(parents, start=1):
        inner = values.get(parent)
        if inner is not None and not isinstance(inner, dict):
            message = (
                f"{'.'.join(parents[:depth])} is a value, not a section, and has no keys to set"
            )
            raise ConfigError([Problem(key=key, message=message)], [f"--set {key}: {message}"])
        values[parent] = dict(inner or {})
        values = values[parent]
    values[name] = value


def _resolve(config: Config, base: str) -> Config:
    """Return the config with every path absolute."""
    mask, model = config.mask, config.model

    def volume(section: Any) -> Any:
        return section.model_copy(update={"volume": resolve_volume(section.volume, base)})

    paths = {
        "path": model.path and resolve_model_path(model.path, base),
        "weights": model.weights and resolve_path(model.weights, base),
    }
    return config.model_copy(
        update={
            "input": volume(config.input),
            "mask": mask and volume(mask),
            "output": volume(config.output),
            "model": model.model_copy(update=paths),
            "run_dir": resolve_path(config.run_dir, base),
        }
    )
