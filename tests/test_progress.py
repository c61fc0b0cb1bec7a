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
    peaks = iter([None, 7])
    counters = Counters(lambda: next(peaks))
    for expected in (0, 7):
        counters.measure_memory()
        assert counters["device_peak_bytes"] == expected
        assert counters["peak_bytes"] > 0
