"""Run on several ranks: one of them meets an exception in the way that is asked for."""

import sys
import threading
import time

from mpichunk.errors import UserError
from mpichunk.ranks.comm import start_mpi
from mpichunk.ranks.crash import crash_guard
from tests.fakeranks import run

VICTIM = 1


class Bomb:
    """Raises in the main thread."""

    def poll(self, now, *, is_leader):
        raise ZeroDivisionError("in the main thread")


class Stubborn:
    """Something that the main thread would wait for on its way out."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        threading.Event().wait()


def compute(lease, *, is_victim, way):
    time.sleep(0.01)
    if is_victim and way == "thread":
        raise ZeroDivisionError("in a thread")
    return True


def main(way):
    comm = start_mpi()
    is_victim = comm.rank == VICTIM
    with crash_guard(comm):
        if way == "exit":
            sys.exit(3)
        if is_victim and way == "before":
            raise ZeroDivisionError("before the loop")
        if way == "user":
            raise UserError("the same on every rank")
        with Stubborn():
            run(
                comm,
                num_blocks=100_000,
                compute=lambda lease: compute(lease, is_victim=is_victim, way=way),
                watch=Bomb() if is_victim and way == "main" else None,
            )


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except UserError as error:
        sys.exit(f"told once: {error}")
