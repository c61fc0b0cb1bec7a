"""Copies beside the computing, on a made-up accelerator whose streams may lag behind the host.

Its memory is the host's, but nothing asked of a stream happens before somebody waits for it:
what forgets to wait computes with old bytes. What torch does outside the copies happens at once, as
if the computing stream were always ahead: the worst case for copies.
"""

import numpy as np
import pytest
import torch

from mpichunk.backends.torch_arrays import TorchArrays
from mpichunk.backends.torch_engine import TorchEngine
from mpichunk.backends.torch_transfer import NUM_BATCHES_AHEAD, Transfer
from tests.blockinference import Mix, make_inference, make_plan, make_request, make_source


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


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_accelerator_that_lags_gives_the_same_bytes(dtype, batch_size):
    plan = make_plan()
    request = make_request(plan, batch_size=batch_size)
    expected = make_inference(plan, "pytorch", request={"batch_size": batch_size})
    lagging = make_inference(plan, "pytorch", request={"batch_size": batch_size})
    engine = TorchEngine(Mix().eval(), request)
    engine._arrays = lagging_arrays()
    lagging = type(lagging)(
        engine,
        request,
        scaling=lagging._scaling,
        window_name="bump",
        activation="sigmoid",
        skip_blank=True,
    )
    expected._activation = "sigmoid"
    mask = np.random.default_rng(3).random((100, 100, 100)) > 0.2
    earlier = []
    for block in [*plan, *plan]:
        source_czyx = make_source(block, seed=block.index)
        mask_zyx = mask[tuple(slice(n) for n in block.output_box.shape)]
        found = lagging.run(block, source_czyx, mask_zyx, np.dtype(dtype))
        wanted = expected.run(block, source_czyx, mask_zyx, np.dtype(dtype)).core()
        earlier.append((found, wanted.copy()))
        # Two blocks are on their way while a third is computed, as in a run.
        if len(earlier) > 2:
            done, wanted = earlier.pop(0)
            np.testing.assert_array_equal(done.core(), wanted)
            done.release()
    for done, wanted in earlier:
        np.testing.assert_array_equal(done.core(), wanted)


def test_the_test_sees_a_copy_that_nobody_waits_for(monkeypatch):
    arrays = lagging_arrays()
    monkeypatch.setattr(ComputingStream, "wait_event", lambda self, event: None)
    source_czyx = np.full((1, 2, 2, 2), 7, np.uint8)
    whole = [(slice(None), slice(None), slice(None))]
    staged = arrays.stage(arrays.feed(source_czyx), whole, patch_shape=(2, 2, 2), batch_size=1)
    assert not bool((staged.patches_nczyx[0] == 7).all())


def test_the_host_runs_at_most_two_batches_ahead():
    module = LaggingModule()
    module.computing = module.current = LaggingStream()
    transfer = Transfer(torch.device("cpu"), module, LaggingEvent, is_pinned=False)
    num_begun = 0

    def begin():
        nonlocal num_begun
        num_begun += 1

    for number in range(10):
        transfer.pace()
        module.computing.tasks.append(begin)
        assert num_begun >= number - NUM_BATCHES_AHEAD
    assert num_begun < 10
