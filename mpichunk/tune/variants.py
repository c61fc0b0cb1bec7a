"""Which ways there are to run a config's network, and in which order they are tried.

Pure: what is installed comes in as facts, what was measured as figures. Knows no networks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpichunk.backends.files.source import WEIGHTS_KEY
from mpichunk.config.checks import check
from mpichunk.config.computerules import KERNELS, PRECISION_HINT, PRECISIONS
from mpichunk.config.schema import Config
from mpichunk.errors import ConfigError

MOST_PATCHES = 64
"""Batches are not made larger: devices are busy long before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the network; shapes and weights are the same in all."""

    backend: str
    batch_size: int
    precision: str = "float32"
    kernels: tuple[str, ...] = ()
    """Kernel options that are on, in the order of `KERNELS`."""

    @property
    def name(self) -> str:
        """In words, e.g. "pytorch bfloat16 + channels_last, batch 2"."""
        how = " + ".join((self.precision, *self.kernels))
        return f"{self.backend} {how}, batch {self.batch_size}"

    @property
    def settings(self) -> dict[str, Any]:
        """Values by config key."""
        kernels = {f"compute.{name}": name in self.kernels for name in KERNELS}
        return {
            "model.backend": self.backend,
            "patch.batch_size": self.batch_size,
            "compute.precision": self.precision,
            **kernels,
        }

    def plus(self, kernel: str) -> "Variant":
        """Return the variant with one more kernel option."""
        wanted = {*self.kernels, kernel}
        return replace(self, kernels=tuple(name for name in KERNELS if name in wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What this machine has, as far as it decides what is worth a try."""

    device: str
    """Where the network computes: `cpu`, `cuda:0`."""

    installed: frozenset[str]
    """Backends whose package is there."""

    has_compiler: bool
    """Whether torch.compile finds what it needs."""

    @property
    def kind(self) -> str:
        """`cpu`, `cuda` or another one."""
        return self.device.partition(":")[0]


def variant_of(config: Config) -> Variant:
    """Return how a config runs its network."""
    return Variant(
        backend=config.model.backend,
        batch_size=config.patch.batch_size,
        precision=config.compute.precision,
        kernels=config.compute.kernels,
    )


def baseline(config: Config) -> Variant:
    """Return what all others are compared with: exact, and no kernels but the framework's own."""
    backends = _backends(config)
    own = config.model.backend
    return Variant(
        backend="pytorch" if "pytorch" in backends else own,
        batch_size=config.patch.batch_size,
    )


def first_round(config: Config, facts: Facts) -> list[Variant]:
    """Return what is tried first: each precision, each layout, each backend that takes the file."""
    start = baseline(config)
    found = [variant_of(config)]
    for backend in _backends(config):
        is_own = backend == config.model.backend
        if not is_own and (backend not in facts.installed or facts.kind != "cpu"):
            continue
        for precision in PRECISIONS[backend]:
            if precision == "tf32" and facts.kind != "cuda":
                continue
            variant = replace(start, backend=backend, precision=precision, kernels=())
            found.append(variant)
            # One may help only together with the other.
            if backend == "pytorch":
                found.append(variant.plus("channels_last"))
    return [variant for variant in dict.fromkeys(found) if variant != start]


def more_kernels(best: Variant, facts: Facts) -> list[str]:
    """Return what can be added to the best so far, one after the other."""
    if best.backend != "pytorch":
        return []
    wanted = ["fold_batch_norm"]
    wanted += ["compile"] if facts.has_compiler else []
    wanted += ["cuda_graphs"] if facts.kind == "cuda" else []
    return [name for name in wanted if name not in best.kernels]


def batch_sizes(size: int) -> tuple[list[int], list[int]]:
    """Return smaller sizes, the largest first, and larger ones, the smallest first."""
    powers = [1 << n for n in range(MOST_PATCHES.bit_length())]
    return (
        [n for n in reversed(powers) if n < size],
        [n for n in powers if size < n <= MOST_PATCHES],
    )


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return the config with other values.

    Raises:
        ConfigError: they do not go together.
    """
    values = config.model_dump()
    for key, value in settings.items():
        section, name = key.split(".")
        values[section][name] = value
    options = values["model"]["options"]
    if settings.get("model.backend", config.model.backend) != config.model.backend:
        # They are words of the other backend, but for what tells where the weights are.
        values["model"]["options"] = {k: v for k, v in options.items() if k == WEIGHTS_KEY}
    elif "compute.precision" in settings and PRECISION_HINT in options:
        del options[PRECISION_HINT]
    found = check(values)
    if isinstance(found, Config):
        return found
    raise ConfigError(found, [f"{problem.key}: {problem.message}" for problem in found])


def changed(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that differ from what the config says."""
    own = variant_of(config).settings
    return {key: value for key, value in settings.items() if own[key] != value}


def _backends(config: Config) -> Sequence[str]:
    """Return the backends that can load the config's network, by the name of its file."""
    return tuple(_able(config.model.backend, config.model.path or ""))


def _able(own: str, path: str) -> Iterator[str]:
    if own in ("identity", "pznet") or path.endswith(".xml"):
        yield own
    elif path.endswith(".onnx"):
        yield from ("onnxruntime", "openvino")
    else:
        yield from ("pytorch", "openvino")
