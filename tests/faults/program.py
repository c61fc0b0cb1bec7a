"""One rank of a run that meets faults: like `python -m mpichunk run CONFIG`, but see `Faults`.

What is to happen comes as JSON in the environment; see `scenario.Fault`. Each time a rank comes
past a point (it reads a block, infers, writes, ...) the faults that wait there are counted down.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpichunk import cli
from mpichunk.backends.identity import IdentityEngine
from mpichunk.block.inference import BlockInference
from mpichunk.block.pipeline import Pipeline
from mpichunk.errors import BlockError
from mpichunk.roles.worker import Worker
from mpichunk.rundir.journal import Journal
from mpichunk.schedule import hang
from mpichunk.schedule.messages import Done
from mpichunk.volume import Writer

DEADLY_SECONDS = 0.4
"""What a block takes that kills its rank: by then all is reported that was computed before."""

GO = "go"
"""A file in the run's folder: once it is there, nothing is slow any more."""

VARIABLE = "MPICHUNK_TEST_FAULTS"
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
POINTS: dict[str, tuple[type, str]] = {
    "read": (Pipeline, "_load"),
    "infer": (BlockInference, "run"),
    "write": (Writer, "write"),
    "report": (Pipeline, "_put"),
    "turn": (Worker, "step"),
    "sync": (Journal, "sync"),
}


class Faults:
    """What this rank is to meet, each once, and a record of what it met and did."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._folder = Path(told["folder"])
        self._go = self._folder / GO
        self._waiting = [fault for fault in told["faults"] if fault["rank"] in (RANK, None)]
        self._lock = threading.Lock()
        self._nan = threading.local()
        self.seconds_per_block = float(told["seconds_per_block"])
        self.bad_blocks = set(told["nan_blocks"])
        self.deadly_blocks = set(told.get("deadly_blocks", ()))
        hang.LEAST_SLOW_SECONDS = told.get("least_slow_seconds", hang.LEAST_SLOW_SECONDS)
        self.is_bad = RANK in told["bad_ranks"]

    def install(self) -> None:
        """Watch each point."""
        for point, (owner, name) in POINTS.items():
            setattr(owner, name, self._watched(point, getattr(owner, name)))
        for fault in self._waiting:
            if fault["point"] == "time":
                timer = threading.Timer(fault["after"], self._meet, [fault])
                timer.daemon = True
                timer.start()
        self._slow_down()
        self._spoil()
        self._count_blocks()

    def pass_by(self, point: str) -> None:
        """Count down the faults at a point, and meet those whose time has come."""
        with self._lock:
            due = []
            for fault in self._waiting:
                if fault["point"] == point:
                    fault["after"] -= 1
                    if fault["after"] == 0:
                        due.append(fault)
        for fault in due:
            self._meet(fault)

    def _watched(self, point: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            self.pass_by(point)
            return function(*arguments, **named)

        return watched

    def _meet(self, fault: dict[str, Any]) -> None:
        self.note("met", f"{fault['kind']} rank {RANK} {fault['point']}")
        if fault["kind"] == "slow":
            self._sleep(fault["seconds"])
        else:
            MEET[fault["kind"]](fault)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._go.exists():
            time.sleep(min(left, 0.05))

    def note(self, name: str, line: str) -> None:
        """Append a line to a file that all ranks share; whole lines never mix."""
        file = os.open(self._folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{line}\n".encode())
        os.close(file)

    def _slow_down(self) -> None:
        """Make each block take a while, as a network would."""
        run = BlockInference.run

        def slow(*arguments: Any, **named: Any) -> Any:
            self._sleep(self.seconds_per_block)
            return run(*arguments, **named)

        BlockInference.run = slow  # type: ignore[method-assign]

    def _spoil(self) -> None:
        """Make the network return NaN for some blocks, or wrong numbers on this rank."""
        run, infer = BlockInference.run, IdentityEngine.infer

        def spoilt_run(this: Any, block: Any, *arguments: Any, **named: Any) -> Any:
            self._nan.on = block.index in self.bad_blocks
            if block.index in self.deadly_blocks:
                self.note("met", f"kill rank {RANK} block {block.index}")
                time.sleep(DEADLY_SECONDS)
                os.kill(os.getpid(), signal.SIGKILL)
            return run(this, block, *arguments, **named)

        def spoilt_infer(this: Any, batch: Any) -> Any:
            out = infer(this, batch)
            if self.is_bad:
                out = out * np.float32(1.01)
            return out * float("nan") if getattr(self._nan, "on", False) else out

        BlockInference.run = spoilt_run  # type: ignore[method-assign]
        IdentityEngine.infer = spoilt_infer  # type: ignore[method-assign]

    def _count_blocks(self) -> None:
        """Note each block whose bytes have been written, before anybody is told."""
        put = Pipeline._put

        def counted(this: Any, record: Any) -> None:
            if isinstance(record, Done):
                self.note("written", str(record.lease.block))
            put(this, record)

        Pipeline._put = counted  # type: ignore[method-assign]


def _signal(number: int) -> Callable[[dict[str, Any]], None]:
    return lambda fault: os.kill(os.getpid(), number)


def _raise(error: type[BaseException], message: str) -> Callable[[dict[str, Any]], None]:
    def throw(fault: dict[str, Any]) -> None:
        raise error(message)

    return throw


MEET: dict[str, Callable[[dict[str, Any]], object]] = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "segfault": lambda fault: ctypes.string_at(0),
    "exit": lambda fault: os._exit(fault["code"]),
    "bug": _raise(KeyError, "made to fail: a bug"),
    "block-error": _raise(BlockError, "made to fail: a stuck disk"),
    "memory-error": _raise(MemoryError, "made to fail: no memory"),
}


def main(config: str) -> int:
    """Run the config and meet the faults."""
    Faults(json.loads(os.environ[VARIABLE])).install()
    return cli.main(["run", config])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
