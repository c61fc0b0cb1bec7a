"""What the environment says of the accelerators that a process may use, and was meant to get.

Pure: the environment comes in. Knows no framework, and does not believe that what is listed works.
"""

from collections.abc import Iterable, Mapping

LISTS: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "NVIDIA's: numbers, UUIDs, names of MIG instances; HIP reads it too",
    "ROCR_VISIBLE_DEVICES": "AMD's, lowest level: the other lists count what it leaves",
    "HIP_VISIBLE_DEVICES": "AMD's, of the HIP runtime",
    "GPU_DEVICE_ORDINAL": "AMD's, of OpenCL and older HIP",
    "ZE_AFFINITY_MASK": "Intel's",
}
"""Variables by which Slurm and users restrict a process to some accelerators of its node."""

_SLURM_LISTS = "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"
_SLURM_COUNTS = (
    "SLURM_GPUS",
    "SLURM_GPUS_ON_NODE",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_SOCKET",
    "SLURM_GPUS_PER_TASK",
)
_HIDING = "", "-1", "NoDevFiles", "void", "none"


def visible_devices(environ: Mapping[str, str]) -> str:
    """Return which accelerators this process is restricted to, as the environment says it.

    Lists that agree, as Slurm sets them, are told once. "all": there is no restriction.
    """
    told: dict[str, str] = {}
    for name in LISTS:
        if name in environ:
            told.setdefault(environ[name], name)
    return " ".join(f"{name}={value or '(none)'}" for value, name in told.items()) or "all"


def listed_name(environ: Mapping[str, str], index: int) -> str | None:
    """Return what the list of visible devices calls the one that the framework gives this number.

    It is a name within the node only where no container or cgroup counts its devices from 0 again;
    a UUID always is.
    """
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        entries = [entry.strip() for entry in environ.get(name, "").split(",")]
        if environ.get(name) and index < len(entries) and entries[index]:
            return entries[index]
    return None


def gpu_hints(environ: Mapping[str, str], device_files: Iterable[str] = ()) -> tuple[str, ...]:
    """Return signs that this process should see accelerators.

    Args:
        environ: the environment.
        device_files: what matches /dev/nvidia[0-9]*; does not count when CUDA_VISIBLE_DEVICES
            hides all devices, as Slurm does for jobs that asked for none.
    """
    hints = [f"{name}={environ[name]}" for name in _SLURM_LISTS if environ.get(name)]
    for name in _SLURM_COUNTS:
        # A count, or counts by model: "2", "a100:2", "a100:1,v100:1".
        numbers = [part.rpartition(":")[2] for part in environ.get(name, "").split(",")]
        if any(number.isdigit() and int(number) > 0 for number in numbers):
            hints.append(f"{name}={environ[name]}")
    if environ.get("CUDA_VISIBLE_DEVICES", "all") not in _HIDING:
        hints += sorted(device_files)
    return tuple(hints)
