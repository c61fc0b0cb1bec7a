"""A config to be tuned, what measures its variants, and one variant made to win."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mpichunk.bench.figures import Spread
from mpichunk.config.file import load_config
from mpichunk.job.startup import prepare
from mpichunk.tune.figures import Row
from mpichunk.tune.measure import Meter, read_patches
from mpichunk.tune.variants import Variant, baseline
from tests.endtoend import write_config
from tests.realnets import EM_MODEL


def em_config(folder: Path, **sections: Any) -> Path:
    """Write a config of the network that ships; a section that is given replaces its default."""
    defaults = {
        "input": {"volume": "synthetic://membranes?shape=32,64,64&seed=7"},
        "model": EM_MODEL,
        "patch": {"shape": [8, 8, 8]},
        "block": {"shape": [32, 32, 32]},
        "output": {"volume": "out.zarr"},
        "compute": {"threads": 1, "device": "cpu"},
    }
    return write_config(folder, **{**defaults, **sections})


def begin(
    path: Path,
    patches_nczyx: npt.NDArray[np.float32] | None = None,
    *,
    num_repeats: int = 1,
    limit_seconds: float = float("inf"),
) -> tuple[Meter, Row]:
    """Return what measures variants of a config, and what it has found of the baseline.

    Args:
        path: The config.
        patches_nczyx: What it measures on; default: patches of the config's volume.
        num_repeats: How often.
        limit_seconds: How long it may take.
    """
    job = prepare(load_config(path).config)
    if patches_nczyx is None:
        patches_nczyx, _ = read_patches(job)
    deadline = time.perf_counter() + limit_seconds
    meter = Meter(job, patches_nczyx, num_repeats=num_repeats, num_local=1, deadline=deadline)
    return meter, meter.measure(baseline(job.config))


def favour(monkeypatch: pytest.MonkeyPatch, is_fast: Callable[[Row], bool]) -> None:
    """Let variants that run count as twice as fast as the baseline, or as fast, as asked.

    And as taking a MiB for each patch: what so small a network takes is less than what a process
    takes now and then, and where it does not grow with the batch no largest batch is told.
    """
    real = Meter.measure

    def measure(self: Meter, variant: Variant) -> Row:
        found = real(self, variant)
        if found.refused:
            return replace(found, speedup=None)
        speed = 2.0 if is_fast(found) else 1.0
        return replace(found, speedup=Spread.of([speed]), nbytes=variant.batch_size << 20)

    monkeypatch.setattr(Meter, "measure", measure)
