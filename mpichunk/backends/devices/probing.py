"""Which accelerators this process sees, and which kind of CPU it runs on.

Looks, and decides nothing: `binding` does that. torch is imported when accelerators are asked for.
"""

import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpichunk.backends.devices.binding import Accelerator, VisibleDevices
from mpichunk.backends.devices.visibility import listed_name


def probe_devices(requested: str = "auto") -> VisibleDevices:
    """Return the accelerators that torch sees, and the CPU's instruction set as torch uses it.

    When `cpu` is requested, accelerators are left alone.
    """
    import torch

    # torch tells by a warning why a driver does not start; the user needs it if no device is found.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = requested != "cpu" and torch.accelerator.is_available()
        num_devices = torch.accelerator.device_count() if found else 0
        current = torch.accelerator.current_accelerator() if num_devices else None
    kind = "" if current is None else str(current.type)
    accelerators = tuple(_accelerator(torch, kind, index) for index in range(num_devices))
    notes = [f"torch {torch.__version__}{_built_for(torch)}"]
    notes += [str(warning.message).strip() for warning in caught]
    return VisibleDevices(
        accelerators=accelerators,
        cpu_kind=f"cpu {torch.backends.cpu.get_cpu_capability()}",
        note="; ".join(notes),
    )


def cpu_kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's instruction set, named as torch names it, without importing torch."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    flags = set(lines[0].split()) if lines else set()
    if {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= flags:
        return "cpu AVX512"
    if {"avx2", "fma"} <= flags:
        return "cpu AVX2"
    return f"cpu {platform.machine()}"


def accelerator_name(torch: Any, kind: str, index: int) -> str:
    """Return the model of an accelerator, e.g. "NVIDIA H100 80GB HBM3"."""
    module: Any = getattr(torch, kind, None)
    if hasattr(module, "get_device_name"):
        return str(module.get_device_name(index))
    return kind


def _accelerator(torch: Any, kind: str, index: int) -> Accelerator:
    """Return what torch tells of one device."""
    return Accelerator(
        kind=kind,
        index=index,
        name=accelerator_name(torch, kind, index),
        physical_id=_physical_id(torch, kind, index),
    )


def _physical_id(torch: Any, kind: str, index: int, environ: Mapping[str, str] = os.environ) -> str:
    """Return the UUID, else the PCI address; else a number, which at worst refuses too much."""
    module: Any = getattr(torch, kind, None)
    listed = listed_name(environ, index)
    if listed is not None and listed.startswith("MIG-"):
        # Instances of one device may all be told with the UUID and address of that device.
        return listed
    number = f"{kind}:{index if listed is None else listed}"
    if not hasattr(module, "get_device_properties"):
        return number
    properties = module.get_device_properties(index)
    uuid = str(getattr(properties, "uuid", None) or "")
    if uuid.strip("0-"):
        return uuid
    bus = getattr(properties, "pci_bus_id", None)
    if bus is None:
        return number
    domain, device = (getattr(properties, f"pci_{n}_id", 0) for n in ("domain", "device"))
    return f"{domain:04x}:{bus:02x}:{device:02x}"


def _built_for(torch: Any) -> str:
    """Return for which accelerators this torch was built, if for none."""
    if torch.version.cuda or torch.version.hip or getattr(torch.version, "xpu", None):
        return ""
    return ", built without CUDA, ROCm or XPU"
