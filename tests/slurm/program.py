"""`mpichunk` as the jobs of these tests run it: slower, on devices that are made up, less patient.

In the environment: `MPICHUNK_TEST_FAULTS` as for `tests.faults.program`; `MPICHUNK_TEST_GPUS`, the
GPUs of every node, e.g. "0,1", of which a process sees what CUDA_VISIBLE_DEVICES, or the variable
that `MPICHUNK_TEST_GPU_LIST` names, leaves.
"""

import json
import os
import socket
import sys
from types import SimpleNamespace
from typing import Any

import mpichunk.backends.devices.probing as devices
from mpichunk import cli
from mpichunk.backends import identity
from mpichunk.backends.devices.binding import VisibleDevices
from mpichunk.rundir import lock
from tests.faults import program

STALE_SECONDS = 8.0
"""So long a job waits for that of a lost node, whose processes it does not see."""


def fake_torch(names: list[str]) -> Any:
    """Return what `devices` asks torch; all MIG instances tell the UUID of the one device."""

    def properties(index: int) -> Any:
        name = names[index]
        return SimpleNamespace(uuid="GPU-parent" if name.startswith("MIG-") else f"GPU-{name}")

    cuda = SimpleNamespace(
        get_device_properties=properties, get_device_name=lambda index: "Fake GPU"
    )
    return SimpleNamespace(cuda=cuda)


def probe(self: identity.IdentityBackend, requested: str) -> VisibleDevices:
    """Return what a process would see of the node's GPUs."""
    gpus = os.environ["MPICHUNK_TEST_GPUS"].split(",")
    listed = os.environ.get(os.environ.get("MPICHUNK_TEST_GPU_LIST", "CUDA_VISIBLE_DEVICES"))
    seen = gpus if listed is None else [n for n in listed.split(",") if n in gpus or "MIG-" in n]
    torch = fake_torch([n if "MIG-" in n else f"{socket.gethostname()}-{n}" for n in seen])
    found = tuple(devices._accelerator(torch, "cuda", k) for k in range(len(seen)))
    return VisibleDevices(accelerators=found, cpu_kind=devices.cpu_kind())


def main(arguments: list[str]) -> int:
    """Do what `python -m mpichunk ARGUMENTS` does."""
    lock.STALE_SECONDS, lock.RENEW_SECONDS = STALE_SECONDS, 1.0
    if "MPICHUNK_TEST_GPUS" in os.environ:
        identity.IdentityBackend.cpu_only = False
        identity.IdentityBackend.probe = probe  # type: ignore[method-assign]
    if arguments[0] == "run" and program.VARIABLE in os.environ:
        program.Faults(json.loads(os.environ[program.VARIABLE])).install()
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
