"""A worker, and a pipeline whose blocks finish when the test says so."""

import queue

from mpichunk.roles.worker import Worker
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


def start_worker(**kwargs):
    """Return a worker with its pipeline and its counters."""
    pipeline = FakePipeline()
    counters = Counters()
    return Worker(pipeline, pipeline.records, counters, **kwargs), pipeline, counters
