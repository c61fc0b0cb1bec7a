import pytest

from mpichunk.schedule.progress import Counters, Throughput
from tests.counting import summed


def test_rates_and_time_left():
    throughput = Throughput(num_blocks=110, num_before=10, start=100.0)
    assert throughput.seconds_left is None
    assert throughput.voxel_rate == 0.0
    throughput.add(summed(blocks=0), 100.0)
    assert throughput.seconds_left is None
    throughput.add(summed(blocks=20, voxels=4e6), 120.0)
    assert throughput.num_done == 30
    assert throughput.voxel_rate == pytest.approx(2e5)
    assert throughput.seconds_left == pytest.approx(80.0)


def test_counters_ask_the_device_with_the_memory():
    host, device = iter([5, 6]), iter([None, 7])
    counters = Counters(host_peak=lambda: next(host), device_peak=lambda: next(device))
    for expected in ((5, 0), (6, 7)):
        counters.measure_memory()
        assert (counters["peak_bytes"], counters["device_peak_bytes"]) == expected
