"""A worker, and a pipeline whose blocks finish when the test says so."""

import queue
import threading

from mpichunk.roles.worker import Worker
from mpichunk.schedule.messages import AskToWrite, WriteVerdict
from mpichunk.schedule.progress import Counters
from tests.blocks import done


class FakePipeline:
    """Remembers what was submitted."""

    num_steps = 0

    def __init__(self):
        self.submitted = []
        self.records = queue.SimpleQueue()

    def submit(self, lease):
        self.submitted.append(lease)

    def drop_waiting(self):
        dropped = self.submitted[1:]
        del self.submitted[1:]
        return dropped

    def finish(self, lease, seconds=2.0):
        record = done(lease, seconds)
        self.records.put(record)
        return record


def start_worker(*, depth=3, **kwargs):
    """Return a worker with its pipeline and its counters."""
    pipeline = FakePipeline()
    counters = Counters()
    worker = Worker(pipeline, pipeline.records, counters, depth=depth, **kwargs)
    return worker, pipeline, counters


def asked_for(worker, permits, lease):
    """Return whether a writer thread of this lease asks; its block may be written."""
    writer = threading.Thread(target=permits.may_write, args=[lease], daemon=True)
    writer.start()
    said = []
    while writer.is_alive():
        said += worker.step()
        if AskToWrite(lease=lease) in said:
            worker.handle(WriteVerdict(lease=lease, may_write=True))
            writer.join()
    return AskToWrite(lease=lease) in said
