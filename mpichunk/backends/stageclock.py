"""Measures what an engine and its arrays are busy with, stage by stage.

Waits for the device after each call, so it belongs into measurements only. Knows no blocks.
"""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from mpichunk.backends.engine import Engine

BENCH_STAGES = ("read", "gather", "forward", "accumulate", "finalise", "host", "write")
"""Stages of a block, in order; `host` is computing outside of all array operations."""

STAGE_OF: Mapping[str, str] = {
    "feed": "gather",
    "stage": "gather",
    "gather": "gather",
    "activate": "accumulate",
    "sums": "accumulate",
    "add_turned": "accumulate",
    "multiply": "accumulate",
    "zeros": "accumulate",
    "vector": "accumulate",
    "window": "accumulate",
    "add_weighted": "accumulate",
    "apply_mask": "finalise",
    "is_finite": "finalise",
    "gate": "finalise",
    "best_channel": "finalise",
    "above": "finalise",
    "quantise": "finalise",
    "clear": "finalise",
    "outgoing": "finalise",
    "send": "finalise",
    "settle": "finalise",
}
"""The stage that each array operation belongs to."""


class StageClock:
    """An engine that counts the seconds of another one's stages."""

    def __init__(self, engine: Engine) -> None:
        self.seconds = dict.fromkeys(BENCH_STAGES, 0.0)
        """Wall seconds so far, by stage."""

        self.arrays: Any = _Clocked(engine.arrays, STAGE_OF, self.seconds, engine.arrays.wait)
        """The engine's array operations, measured."""

        self.infer: Any = _Clocked(
            engine, {"infer": "forward"}, self.seconds, engine.arrays.wait
        ).infer
        """The engine's forward, measured."""

        self.info = engine.info
        self.is_out_of_memory = engine.is_out_of_memory
        self.explain = engine.explain


class _Clocked:
    """Something whose methods are measured."""

    def __init__(
        self, inner: Any, stage_of: Mapping[str, str], seconds: dict[str, float], wait: Any
    ) -> None:
        self._inner = inner
        self._stage_of = stage_of
        self._seconds = seconds
        self._wait = wait

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        stage = self._stage_of.get(name)
        if stage is None:
            return value

        def measured(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            result = value(*args, **kwargs)
            self._wait()
            self._seconds[stage] += perf_counter() - started
            return result

        return measured
