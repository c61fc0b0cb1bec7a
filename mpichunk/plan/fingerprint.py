"""The hash of everything that changes the result, key by key.

Two runs with equal fingerprints write equal bytes. Kept as a dictionary, so that a refusal can name
what differs. Reads the model's files; knows no network and no volume.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpichunk.config.described.unpacking import path_in_archive
from mpichunk.config.schema import Config, Model
from mpichunk.filehash import file_hash
from mpichunk.geometry.volumeinfo import VolumeInfo

Fingerprint = dict[str, Any]
"""Dotted key to JSON value: flat, so that differing keys can be named."""


def make_fingerprint(
    config: Config,
    *,
    volume: VolumeInfo,
    mask: VolumeInfo | None,
    model_files: Sequence[Path],
    device_kind: str,
    threads: int | None,
) -> Fingerprint:
    """Return the fingerprint of a run.

    Args:
        config: the effective config, paths resolved.
        volume: the input as opened.
        mask: the mask as opened, if there is one.
        model_files: files whose bytes are the network.
        device_kind: accelerator model or CPU instruction set.
        threads: CPU threads per rank, or None where they do not touch the result.
    """
    sections: dict[str, Any] = {
        "input": _identity(volume)
        | {
            "pad": config.input.pad,
            "normalize": config.input.normalize and config.input.normalize.model_dump(mode="json"),
        },
        "roi": config.roi and config.roi.model_dump(mode="json"),
        "mask": mask and _identity(mask) | {"invert": config.mask and config.mask.invert},
        "model": _network(config.model)
        # The order of the names means nothing.
        | {"augment": sorted(set(config.model.augment))}
        | {"files": {f"{i}:{path.name}": file_hash(path) for i, path in enumerate(model_files)}},
        "patch": config.patch.model_dump(mode="json") | {"overlap": config.overlap},
        "block": config.block.model_dump(mode="json") | {"margin": _effective_margin(config)},
        "output": config.output.model_dump(mode="json") | {"chunk_shape": config.chunk_shape},
        "compute": {
            "device_kind": device_kind,
            "precision": config.compute.precision,
            "threads": threads,
            "deterministic": config.compute.deterministic,
        }
        # Those that are on: one that is off changes nothing.
        | dict.fromkeys(config.compute.kernels, True),
    }
    flat = dict(_flatten("", sections))
    # Through JSON once, so that a fresh fingerprint equals one read back from a journal.
    result: Fingerprint = json.loads(json.dumps(flat, sort_keys=True))
    return result


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each key in which two fingerprints differ, sorted by key."""
    return [
        f"{key}: {_value_words(old, key)} then, {_value_words(new, key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def differing_keys(old: Config, new: Config) -> list[str]:
    """Return the keys in which two configs differ that their results depend on.

    What a volume or a file holds is not looked at; the fingerprints of their runs tell more.
    """
    settings = [
        dict(_flatten("", config.model_dump(mode="json") | {"model": _network(config.model)}))
        for config in (old, new)
    ]
    keys = settings[0].keys() | settings[1].keys()
    return sorted(
        key
        for key in keys
        if settings[0].get(key) != settings[1].get(key)
        and not key.startswith(("schedule.", "run_dir", "compute."))
    )


def _identity(volume: VolumeInfo) -> dict[str, Any]:
    """Return what tells one volume from another without reading its voxels."""
    return {
        "location": volume.location,
        "dtype": volume.dtype.name,
        "start": volume.domain.start,
        "stop": volume.domain.stop,
        "num_channels": volume.num_channels,
        "mip": volume.mip,
        "voxel_size": volume.voxel_size,
    }


def _network(model: Model) -> dict[str, Any]:
    """Return the section of the network; what lies in an archive, as its place in that.

    Where it was unpacked is the run directory, which changes no byte of a result.
    """
    values = model.model_dump(mode="json")
    for key in ("path", "weights"):
        values[key] = (values[key] and path_in_archive(values[key])) or values[key]
    return values


def _effective_margin(config: Config) -> tuple[int, int, int] | None:
    """Return the margin, or None where it is without effect."""
    return config.margin if config.block.stitch == "crop" else None


def _flatten(prefix: str, value: Any) -> list[tuple[str, Any]]:
    """Return the leaves of nested dictionaries with dotted keys."""
    if not isinstance(value, dict):
        return [(prefix, value)]
    leaves: list[tuple[str, Any]] = []
    for key, inner in value.items():
        leaves += _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    return leaves


def _value_words(parts: Mapping[str, Any], key: str) -> str:
    """Return a value in words; fingerprints leave out what `compute` has at its default."""
    if key not in parts and key.startswith("compute."):
        return "default"
    return _short(parts.get(key))


def _short(value: Any) -> str:
    """Return a value as few enough words to be told."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
