"""Which ways there are to run a config's network, and in which order they are tried.

Pure: what is installed comes in as facts, what was measured as figures. Knows no networks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpichunk.backends.files.source import WEIGHTS_KEY
from mpichunk.backends.openvino.instructions import OPTION
from mpichunk.config.checks import check
from mpichunk.config.computerules import KERNELS, PRECISION_HINT, PRECISIONS
from mpichunk.config.schema import Config
from mpichunk.errors import ConfigError

MOST_PATCHES = 64
"""Batches are not made larger: devices are busy long before."""

INSTRUCTIONS = f"model.options.{OPTION}"
"""The key of the widest instructions, beside which the user's other options stay."""

NARROW = "AVX2"
"""What is tried instead of AVX-512."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the network; shapes and weights are the same in all."""

    backend: str
    batch_size: int
    precision: str = "float32"
    kernels: tuple[str, ...] = ()
    """Kernel options that are on, in the order of `KERNELS`."""

    instructions: str | None = None
    """The widest that convolutions of openvino may take; None for all that there are."""

    @property
    def name(self) -> str:
        """In words, e.g. "pytorch bfloat16 + channels_last, batch 2"."""
        limit = () if self.instructions is None else (f"{self.instructions} at most",)
        how = " + ".join((self.precision, *self.kernels, *limit))
        return f"{self.backend} {how}, batch {self.batch_size}"

    @property
    def settings(self) -> dict[str, Any]:
        """Values by config key."""
        kernels = {f"compute.{name}": name in self.kernels for name in KERNELS}
        limit = {INSTRUCTIONS: self.instructions} if self.backend == "openvino" else {}
        return {
            "model.backend": self.backend,
            "patch.batch_size": self.batch_size,
            "compute.precision": self.precision,
            **kernels,
            **limit,
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

    has_avx512: bool = False
    """Whether the network computes on a CPU with AVX-512."""

    @property
    def kind(self) -> str:
        """`cpu`, `cuda` or another one."""
        return self.device.partition(":")[0]


def variant_of(config: Config) -> Variant:
    """Return how a config runs its network."""
    backend, limit = config.model.backend, config.model.options.get(OPTION)
    return Variant(
        backend=backend,
        batch_size=config.patch.batch_size,
        precision=config.compute.precision,
        kernels=config.compute.kernels,
        instructions=str(limit) if backend == "openvino" and limit is not None else None,
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
    # What is exact first: there may be no time for all.
    found.sort(key=lambda variant: variant.precision != "float32")
    return [variant for variant in dict.fromkeys(found) if variant != start]


def narrower(measured: Sequence[Variant], facts: Facts) -> list[Variant]:
    """Return those of openvino once more, each without AVX-512.

    In float32 only: AVX2 has no arithmetic of halves.
    """
    if not facts.has_avx512:
        return []
    found = [
        replace(variant, instructions=NARROW)
        for variant in measured
        if (variant.backend, variant.precision) == ("openvino", "float32")
    ]
    return list(dict.fromkeys(found))


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
    values["model"]["options"] = _options(config, settings)
    for key, value in settings.items():
        if key != INSTRUCTIONS:
            section, name = key.split(".")
            values[section][name] = value
    found = check(values)
    if isinstance(found, Config):
        return found
    raise ConfigError(found, [f"{problem.key}: {problem.message}" for problem in found])


def _options(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the model that go with other values."""
    options = dict(config.model.options)
    if settings.get("model.backend", config.model.backend) != config.model.backend:
        # They are words of the other backend, but for what tells where the weights are.
        options = {key: value for key, value in options.items() if key == WEIGHTS_KEY}
    elif settings.get("compute.precision", config.compute.precision) != config.compute.precision:
        options.pop(PRECISION_HINT, None)
    if INSTRUCTIONS in settings:
        options.pop(OPTION, None)
        if settings[INSTRUCTIONS] is not None:
            options[OPTION] = settings[INSTRUCTIONS]
    return options


def changed(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return, by config key, what differs from what the config says; options as a whole."""
    own = variant_of(config).settings
    found = {k: v for k, v in settings.items() if k != INSTRUCTIONS and own[k] != v}
    options = _options(config, settings)
    return found if options == config.model.options else {**found, "model.options": options}


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
