"""Which instructions oneDNN, by which OpenVINO computes convolutions, may take on x86 CPUs.

It takes the widest that there are, which is not always the fastest: of 16 lanes a layer with 8
channels leaves half idle, and CPUs that halve wide instructions gain nothing by them. Knows no
networks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mpichunk.config.schema import Model
from mpichunk.errors import ModelError

OPTION = "ONEDNN_MAX_CPU_ISA"
"""Of `model.options`: oneDNN's environment variable of this name."""

NARROWER = {"AVX2": "avx512", "AVX512_CORE": "amx"}
"""By value what the names of wider kernels hold."""


def limit_of(model: Model) -> str | None:
    """Return the widest instructions that the config allows, None for all.

    Raises:
        ModelError: oneDNN knows no such ones.
    """
    found = model.options.get(OPTION)
    if found is None:
        return None
    if str(found) not in NARROWER:
        raise ModelError(
            f"{OPTION} is {found!r}; expected {' or '.join(NARROWER)}", key="model.options"
        )
    return str(found)


@contextmanager
def limited(limit: str | None) -> Iterator[None]:
    """Let networks that are compiled inside take none that are wider.

    Not for longer: torch has a oneDNN of its own, which looks, too.
    """
    if limit is None:
        yield
        return
    before = os.environ.get(OPTION)
    os.environ[OPTION] = limit
    try:
        yield
    finally:
        del os.environ[OPTION]
        if before is not None:
            os.environ[OPTION] = before


def check_limit(compiled: Any, limit: str | None) -> None:
    """Refuse a compiled network that takes wider instructions: oneDNN looks once per process.

    Raises:
        ModelError: a network was compiled before, with no such limit.
    """
    if limit is None:
        return
    kernels = {str(op.get_rt_info()["primitiveType"].value) for op in _operations(compiled)}
    wider = sorted(name for name in kernels if NARROWER[limit] in name)
    if wider:
        raise ModelError(
            f"{OPTION} {limit} has no effect ({wider[0]}): oneDNN looks once per process, and "
            "another network was compiled before",
            key="model.options",
        )


def _operations(compiled: Any) -> list[Any]:
    """Return the operations as they run, those that oneDNN has a kernel for."""
    return [
        op for op in compiled.get_runtime_model().get_ops() if "primitiveType" in op.get_rt_info()
    ]
