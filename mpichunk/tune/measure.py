"""Measures one variant with real forwards, in turns with the baseline, on patches of the volume.

Loads networks one after another, in this process or one of their own (`trial`,
`subprocess_trial`). Knows no order of trials and no config files.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.backends import get_backend
from mpichunk.backends.numpy_arrays import scale
from mpichunk.bench.figures import Spread
from mpichunk.block.inference import scaling_for
from mpichunk.errors import DEVICE_FAILURES, ModelError, UserError
from mpichunk.geometry.padding import pad, source_box
from mpichunk.job.host_memory import host_room, memory_groups
from mpichunk.job.memory_check import device_room
from mpichunk.job.startup import Job
from mpichunk.plan.estimate import estimate
from mpichunk.plan.premise import Premise
from mpichunk.plan.probe import Probe
from mpichunk.tune.figures import HEADROOM, Outputs, Row, difference
from mpichunk.tune.subprocess_trial import SubprocessTrial
from mpichunk.tune.trial import VariantTrial, job_of, reason
from mpichunk.tune.variants import Variant
from mpichunk.volume import Reader
from mpichunk.words import size

NUM_PATCHES = 4
"""Patches of the volume that variants are compared on."""

MOST_PATCHES_SEEN = 64
"""Patches that are read at most to find such that are not blank."""

TURN_SECONDS = 0.5
"""How long one variant is measured before it is the other's turn."""

HOPELESS = 0.1
"""A variant of less than this share of the baseline's speed is not measured at length."""

NUM_WEIGHED = 3
"""What weighing a batch takes, in forwards: one to warm up, one that is measured, and loading."""

log = logging.getLogger(__name__)


class Meter:
    """Keeps the baseline loaded, and measures everything else against it."""

    def __init__(
        self,
        job: Job,
        patches_nczyx: npt.NDArray[np.float32],
        *,
        num_repeats: int,
        num_local: int,
        deadline: float,
    ) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            job: the config, its paths resolved, and its volumes.
            patches_nczyx: what the network sees, scaled.
            num_repeats: turns of each variant.
            num_local: ranks that will share a host.
            deadline: when to stop, by `time.perf_counter`.
        """
        self._job = job
        self._patches_nczyx = patches_nczyx
        self._num_repeats = num_repeats
        self._num_local = num_local
        self._deadline = deadline
        self._baseline: VariantTrial | None = None
        self._expected: Outputs | None = None
        self._forward_nbytes: dict[Variant, tuple[int, int]] = {}
        self.available: int | None = None
        """Memory that a rank may take where the baseline computes, bytes; None if nobody knows."""

    @property
    def baseline(self) -> VariantTrial:
        """The baseline, once it was measured."""
        assert self._baseline is not None
        return self._baseline

    @property
    def is_on_host(self) -> bool:
        """Whether networks compute on a CPU."""
        return self.baseline.request.device == "cpu"

    def measure(self, variant: Variant) -> Row:
        """Return what was found; the first variant is the baseline, whose failures are raised.

        Raises:
            UserError: the baseline does not run.
        """
        if self._baseline is None:
            return self._measure_baseline(variant)
        row = self._measure_other(variant)
        told = (row.refused if row.is_tried else f"not tried: {row.refused}") or (
            f"{row.speedup.median:.2f} times the baseline's speed" if row.speedup else ""
        )
        log.info("%s: %s", variant.name, told)
        return row

    def _measure_baseline(self, variant: Variant) -> Row:
        loaded = VariantTrial.load(self._job, variant, self._patches_nczyx)
        try:
            loaded.engine.infer(loaded.batch_nczyx)
        except UserError:
            raise
        except Exception as error:
            raise loaded.engine.explain(error) from error
        expected = loaded.outputs()
        if not np.isfinite(expected).all():
            raise ModelError(
                f"the network returned NaN or inf for patches of the volume ({variant.name}), so "
                "there is nothing to compare with; look at the input, and at model.weights",
                key="model.weights",
            )
        self._baseline, self._expected = loaded, expected
        self.available = self._room(loaded)
        count = _count(loaded)
        seconds = [loaded.forwards(count) / count for _ in range(self._num_repeats)]
        log.info("%s: %.3g s a batch", variant.name, median(seconds))
        per_patch = [value / variant.batch_size for value in seconds]
        return Row(
            variant=variant,
            seconds=Spread.of(per_patch),
            speedup=Spread.of([1.0]),
            difference=difference(expected, expected),
            nbytes=self._nbytes(loaded, median(seconds)),
        )

    def _measure_other(self, variant: Variant) -> Row:
        if perf_counter() > self._deadline:
            words = "the time of --limit-seconds is over"
            return Row(variant=variant, refused=words, is_tried=False)
        if too_large := self._too_large(variant):
            return Row(variant=variant, refused=too_large)
        try:
            with self._loading(variant) as loaded:
                return self._compare(loaded)
        except DEVICE_FAILURES as error:
            return Row(variant=variant, refused=reason(error))

    def _compare(self, loaded: VariantTrial | SubprocessTrial) -> Row:
        """Measure in turns: baseline, variant, baseline, variant."""
        base, expected = self.baseline, self._expected
        assert expected is not None
        if hopeless := self._hopeless(loaded):
            return Row(variant=loaded.variant, refused=hopeless)
        apart = difference(loaded.outputs(), expected)
        counts = _count(base), _count(loaded)
        seconds, speedups = [], []
        for _ in range(self._num_repeats):
            before = base.forwards(counts[0]) / (counts[0] * base.variant.batch_size)
            seconds.append(loaded.forwards(counts[1]) / (counts[1] * loaded.variant.batch_size))
            speedups.append(before / seconds[-1])
        return Row(
            variant=loaded.variant,
            seconds=Spread.of(seconds),
            speedup=Spread.of(speedups),
            difference=apart,
            nbytes=self._nbytes(loaded, median(seconds) * loaded.variant.batch_size),
        )

    def _hopeless(self, loaded: VariantTrial | SubprocessTrial) -> str:
        """Return why a variant is not measured at length; "" if it should be."""
        # The first forward may compile.
        loaded.forwards(1)
        share = loaded.forwards(1) / loaded.variant.batch_size
        share /= self.baseline.forwards(1) / self.baseline.variant.batch_size
        return f"a forward takes {share:.0f} times as long" if share > 1 / HOPELESS else ""

    @contextmanager
    def _loading(self, variant: Variant) -> Iterator[VariantTrial | SubprocessTrial]:
        """Load the network as a variant runs it, and give back at last what it took."""
        self.baseline.release()
        # What loading says is the same for all.
        logging.disable(logging.INFO)
        try:
            with closing(self._load(variant)) as loaded:
                yield loaded
        finally:
            logging.disable(logging.NOTSET)

    def _load(self, variant: Variant) -> VariantTrial | SubprocessTrial:
        """Load the network; where instructions are limited, not here: oneDNN has looked already."""
        load = VariantTrial.load if variant.instructions is None else SubprocessTrial
        return load(self._job, variant, self._patches_nczyx)

    def is_fitting(self, variant: Variant, seconds: float) -> bool | None:
        """Run forwards of a batch that should fit; return whether it does.

        None if there is no time, or nobody knows what they took, or on a host: one that does not
        fit there is no error, but the end of this process, with all that was found.

        Args:
            variant: what is to be run.
            seconds: what one forward is expected to take.
        """
        if self.is_on_host:
            return None
        if self.available is None or perf_counter() + NUM_WEIGHED * seconds > self._deadline:
            return None
        try:
            with self._loading(variant) as loaded:
                nbytes = self._nbytes(loaded, seconds)
        except DEVICE_FAILURES as error:
            log.debug("%s: %s", variant.name, reason(error))
            return False
        return None if nbytes is None else nbytes <= (1 - HEADROOM) * self.available

    def _nbytes(self, loaded: VariantTrial | SubprocessTrial, seconds: float) -> int | None:
        """Return what a rank takes where the network computes, its forward measured."""
        forward = loaded.forward_nbytes()
        if forward is None:
            return None
        key = replace(loaded.variant, batch_size=1)
        self._forward_nbytes[key] = loaded.variant.batch_size, forward
        return self._need(
            job_of(self._job, loaded.variant), Probe(seconds=seconds, nbytes=forward, device="")
        )

    def _need(self, job: Job, probe: Probe) -> int:
        """Return what a rank takes where the network computes."""
        files = get_backend(job.config.model.backend).model_files(job.config.model)
        nbytes = sum(path.stat().st_size for path in files)
        found = estimate(
            Premise(
                plan=job.plan,
                config=job.config,
                info=job.volume,
                model_nbytes=nbytes,
                probe=probe,
            )
        )
        is_on_cpu = self._baseline is None or self._baseline.request.device == "cpu"
        return found.cpu_nbytes if is_on_cpu else found.device_nbytes

    def _room(self, loaded: VariantTrial) -> int | None:
        """Return what a rank may take where a network computes."""
        if loaded.request.device == "cpu":
            groups = [(group, self._num_local) for group in memory_groups()]
            return host_room(self._num_local, groups).nbytes
        room = device_room(loaded.engine)
        return None if room is None else room.nbytes

    def _too_large(self, variant: Variant) -> str:
        """Return why a batch cannot fit, by what a smaller one took; "" if it may."""
        known = self._forward_nbytes.get(replace(variant, batch_size=1))
        if known is None or known[0] >= variant.batch_size or self.available is None:
            return ""
        forward = known[1] * variant.batch_size // known[0]
        need = self._need(job_of(self._job, variant), Probe(seconds=0, nbytes=forward, device=""))
        if need <= (1 - HEADROOM) * self.available:
            return ""
        return (
            f"it would take {size(need)}, but {size(self.available)} are available, of which "
            f"{HEADROOM:.0%} must stay free"
        )


def read_patches(job: Job) -> tuple[npt.NDArray[np.float32], bool]:
    """Return (n, c, z, y, x) scaled patches from the middle of the volume, and whether it has any.

    Where all that is looked at is blank, chance in [0, 1] stands for it.

    Raises:
        UserError: the input cannot be read.
    """
    plan, domain = job.plan, job.volume.domain
    found: list[npt.NDArray[Any]] = []
    num_seen = 0
    with ExitStack() as stack:
        reader = stack.enter_context(Reader.reopen(job.volume_handle, num_threads=1))
        for step in range(len(plan)):
            block = plan[(len(plan) // 2 + step) % len(plan)]
            for box in block.patches():
                if len(found) == NUM_PATCHES or num_seen == MOST_PATCHES_SEEN:
                    break
                wanted = box.grow(block.crop)
                inside = source_box(wanted, domain)
                inside_czyx = reader.read(inside).result()
                patch = pad(inside_czyx, inside, wanted, domain, job.config.input.pad)
                num_seen += 1
                if patch.any():
                    found.append(np.array(patch))
            if len(found) == NUM_PATCHES or num_seen == MOST_PATCHES_SEEN:
                break
    scaling = scaling_for(job.volume.dtype, job.config.input.normalize)
    if found:
        patches_nczyx = np.stack(found).astype(np.float32)
        scale(patches_nczyx, scaling)
        return patches_nczyx, True
    shape = NUM_PATCHES, job.volume.num_channels, *job.config.patch.shape
    return np.random.default_rng(0).random(shape, dtype=np.float32), False


def _count(loaded: VariantTrial | SubprocessTrial) -> int:
    """Return how many forwards fill a turn, after one that warms up."""
    loaded.forwards(1)
    return max(1, int(TURN_SECONDS / max(loaded.forwards(1), 1e-9)))
