import io

import numpy as np
import pytest

from mpichunk.job.display import BarDisplay, LineDisplay, get_display, summarise
from mpichunk.schedule.progress import COUNTERS, Throughput
from tests.counting import summed


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_come_often_at_first_and_then_rarely():
    lines = []
    throughput = Throughput(num_blocks=1000, num_before=0, start=0.0)
    display = LineDisplay(throughput, size=4, emit=lines.append)
    for second in range(3600):
        display.update(summed(blocks=second // 4, voxels=second * 1e6, busy=3), float(second))
    assert 50 < len(lines) < 100
    assert lines[-1].startswith("8")
    assert "of 1,000 blocks, 1.00 Mvox/s, " in lines[-1]
    assert "min left, 3 of 4 ranks busy" in lines[-1]


def test_failures_are_told():
    lines = []
    display = LineDisplay(
        Throughput(num_blocks=9, num_before=0, start=0.0), size=1, emit=lines.append
    )
    display.update(summed(failures=2), 1.0)
    display.close()
    assert lines == [
        "0 of 9 blocks, 0.00 Mvox/s, time left unknown, 0 of 1 rank busy, 2 attempts failed"
    ]


def test_a_terminal_gets_one_line_that_is_written_over():
    stream = Terminal()
    display = BarDisplay(Throughput(num_blocks=9, num_before=2, start=0.0), size=3, stream=stream)
    display.update(summed(blocks=1, voxels=5e6, busy=3), 10.0)
    display.close()
    text = stream.getvalue()
    assert "3/9" in text
    assert "0.50 Mvox/s" in text
    assert "3 of 3 ranks busy" in text
    assert text.rindex("\x1b[?25h") > text.index("\x1b[?25l")


@pytest.mark.parametrize(
    ("stream", "kind"), [(io.StringIO(), LineDisplay), (Terminal(), BarDisplay)]
)
def test_a_terminal_gets_a_bar_and_a_file_lines(stream, kind):
    display = get_display(size=2, num_blocks=4, num_before=0, start=0.0, stream=stream)
    assert isinstance(display, kind)
    display.update(summed(), 0.0)
    display.close()


def test_the_summary_says_what_was_done_and_how_evenly():
    vectors = np.array(
        [
            [*summed(blocks=b, patches=4 * b, voxels=1e6 * b, infer=i, read=1.0).values()]
            for b, i in ((10, 20.0), (20, 40.0), (12, 30.0))
        ]
    )
    text = summarise(vectors, num_blocks=50, num_before=8, seconds=50.0)
    lines = text.splitlines()
    assert lines[0] == "blocks   42 done, 8 before, of 50"
    assert lines[1] == "patches  168"
    assert "42.0 Mvox in 50 s: 0.84 Mvox/s" in lines[2]
    assert "over 3 ranks" in lines[3]
    assert lines[5].split() == ["infer", "20.0", "30.0", "40.0"]
    assert lines[7].split() == ["busy", "inferring,", "%", "40.0", "60.0", "80.0"]


def test_the_summary_tells_of_a_device_where_there_is_one():
    none, some = summed(peak_bytes=2**21), summed(peak_bytes=2**21, device_peak_bytes=2**30)
    for ranks, expected in (([none, none], None), ([none, some], ["0.0", "512.0", "1024.0"])):
        vectors = np.array([list(rank.values()) for rank in ranks])
        lines = summarise(vectors, num_blocks=1, num_before=0, seconds=1.0).splitlines()
        found = [line.split()[-3:] for line in lines if "on device" in line]
        assert found == ([] if expected is None else [expected])


def test_the_summary_of_nothing():
    text = summarise(np.zeros((1, len(COUNTERS))), num_blocks=0, num_before=0, seconds=0.0)
    assert "0 done, of 0" in text
