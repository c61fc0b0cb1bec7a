"""A made-up accelerator whose streams may lag behind the host.

Its memory is the host's, but nothing asked of a stream happens before somebody waits for it:
what forgets to wait computes with old bytes. What torch does outside the copies happens at once, as
if the computing stream were always ahead: the worst case for copies.
"""

import torch

from mpichunk.backends.pytorch.arrays import TorchArrays
from mpichunk.backends.pytorch.transfer import Transfer


class LaggingStream:
    """Keeps what it is asked for until somebody waits."""

    def __init__(self):
        self.tasks = []

    def run(self):
        while self.tasks:
            self.tasks.pop(0)()

    def wait_event(self, event):
        self.tasks.append(event.synchronize)

    def synchronize(self):
        self.run()


class ComputingStream(LaggingStream):
    """Does at once what it is asked for, and waits at once."""

    def wait_event(self, event):
        event.synchronize()


class LaggingEvent:
    def __init__(self):
        self.stream, self.place = None, 0

    def record(self, stream):
        self.stream = stream

        def reached():
            self.is_reached = True

        self.is_reached = False
        stream.tasks.append(reached)
        if isinstance(stream, ComputingStream):
            stream.run()

    def synchronize(self):
        while not self.is_reached:
            self.stream.tasks.pop(0)()


class LaggingModule:
    """What `torch.cuda` is to CUDA."""

    def __init__(self):
        self.computing = ComputingStream()
        self.current = self.computing

    def Stream(self, device):  # noqa: N802
        return LaggingStream()

    def current_stream(self, device):
        return self.current

    def stream(self, stream):
        module = self

        class Context:
            def __enter__(self):
                module.current = stream

            def __exit__(self, *exception):
                module.current = module.computing

        return Context()


class LaggingTransfer(Transfer):
    """Copies in its streams only when they get there."""

    def _copy(self, target, source):
        self._module.current.tasks.append(lambda: target.copy_(source))


def lagging_arrays():
    device = torch.device("cpu")
    transfer = LaggingTransfer(device, LaggingModule(), LaggingEvent, is_pinned=False)
    return TorchArrays(device, transfer)
