"""A rank of `contest`: a real worker and its permits; its threads go on when the test says so."""

import queue
import threading
from contextlib import suppress

from mpichunk.roles.permits import Permits
from mpichunk.roles.worker import Worker
from mpichunk.schedule.messages import Done, Dropped, Failed
from mpichunk.schedule.progress import Counters

LEASE_SECONDS = 5.0
"""What is late: such blocks ask, too."""


class Turns:
    """Stands in for a `threading.Condition`: who waits goes on when the test says so, not before.

    Only one thread runs at a time, so that no lock is needed.
    """

    def __init__(self):
        self.local = threading.local()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def notify_all(self):
        pass

    def wait_for(self, predicate):
        write = self.local.write
        write.predicate = predicate
        write.yield_()
        write.predicate = None


class Write:
    """A writer thread of a rank, from its question to the last byte."""

    def __init__(self, permits, lease):
        self.lease, self.permits, self.predicate = lease, permits, None
        self.answer = None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._is_dead = False
        threading.Thread(target=self._run, daemon=True).start()
        self._theirs.acquire()

    def _run(self):
        self.permits._changed.local.write = self
        with suppress(SystemExit):
            self.answer = self.permits.may_write(self.lease)
        self._theirs.release()

    def yield_(self):
        self._theirs.release()
        self._mine.acquire()
        if self._is_dead:
            raise SystemExit

    def wake(self):
        """Let the thread go on, if what it waits for has come."""
        if self.predicate is not None and self.predicate():
            self._mine.release()
            self._theirs.acquire()

    def kill(self):
        if self.answer is None:
            self._is_dead = True
            self._mine.release()
            self._theirs.acquire()


class Rank:
    """A worker, its permits, and a pipeline in which things happen one at a time."""

    def __init__(self, world, number, own):
        self.world, self.number, self.num_steps = world, number, 0
        self.permits = Permits(threading.Event(), clock=lambda: world.now)
        self.permits._changed = Turns()
        self.permits.lease_seconds = LEASE_SECONDS
        self.waiting, self.writes, self.records = [], [], queue.SimpleQueue()
        self.worker = Worker(
            self,
            self.records,
            Counters(),
            depth=world.depth,
            own_blocks=own,
            permits=self.permits,
            clock=lambda: world.now,
        )

    def submit(self, lease):
        # What a block takes in memory is bounded, however many leases wait.
        assert len(self.waiting) + len(self.writes) < self.world.depth
        self.waiting.append(lease)

    def drop_waiting(self):
        dropped, self.waiting = self.waiting[1:], self.waiting[:1]
        return dropped

    def compute(self):
        self.num_steps += 1
        lease = self.waiting.pop(0)
        self.world.computed[lease.block] += 1
        if self.world.fails(self.number, lease):
            self.records.put(Failed(lease=lease, error="BlockError", message=f"no {lease.block}"))
        else:
            write = Write(self.permits, lease)
            self.writes.append(write)
            self.look_at(write)

    def look_at(self, write):
        """Begin to write, or drop a block, once the thread has its answer."""
        if write.answer is False:
            self.writes.remove(write)
            self.records.put(Dropped(lease=write.lease))
        elif write.answer:
            self.world.disk.begin(self.number, write.lease.block)

    def wake(self, write):
        write.wake()
        self.look_at(write)

    def end(self, write):
        """Write the last byte, or find that the disk does not want it."""
        self.num_steps += 1
        self.writes.remove(write)
        block = write.lease.block
        if self.world.random.random() < self.world.write_failures:
            self.world.disk.end(self.number, block, None)
            record = Failed(lease=write.lease, error="OSError", message="disk")
        else:
            value = self.world.value(self.number)
            self.world.disk.end(self.number, block, value)
            record = Done(
                lease=write.lease,
                num_patches=1,
                num_voxels=1,
                nbytes_read=1,
                nbytes_written=1,
                seconds={"read": 0.0, "infer": self.world.seconds(), "write": 0.0},
                checksum=value,
            )
        self.records.put(record)

    def actions(self):
        """Return what may happen next in this rank's threads."""
        found = [self.compute] if self.waiting else []
        for write in self.writes:
            if write.answer:
                found.append(lambda w=write: self.end(w))
            elif write.predicate():
                found.append(lambda w=write: self.wake(w))
        return found

    def die(self):
        for write in self.writes:
            if write.answer:
                self.world.disk.end(self.number, write.lease.block, None)
            write.kill()
