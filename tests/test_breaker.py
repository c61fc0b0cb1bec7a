import pytest

from mpichunk.schedule.breaker import Breaker
from mpichunk.schedule.messages import Failed, Lease

PLENTY = 1000


def failed(block, message="no such chunk", *, attempt=1, error="BlockError", kind=""):
    lease = Lease(block=block, attempt=attempt)
    return Failed(lease=lease, error=error, message=message, kind=kind)


def breaker(size=4, limit=10):
    return Breaker(num_ranks=size, max_consecutive_failures=limit)


def test_a_full_disk_stops_at_once_also_when_little_is_left():
    full = failed(7, "could not write: No space left on device", error="DiskFullError")
    assert breaker().fail(0, full, num_left=0) == "could not write: No space left on device"


@pytest.mark.parametrize(("size", "num_needed"), [(2, 2), (3, 3), (4, 3), (100, 3)])
def test_the_same_error_on_the_first_blocks_of_several_ranks(size, num_needed):
    watcher = breaker(size)
    for rank in range(num_needed):
        # Boxes differ, the error does not.
        why = watcher.fail(rank, failed(rank, f"NaN in [{rank}, 64)"), num_left=PLENTY)
        assert (why is not None) == (rank == num_needed - 1)
    assert f"first blocks of {num_needed} ranks failed alike" in why
    assert "NaN in" in why


def test_a_kind_counts_and_not_the_words():
    watcher = breaker()
    whys = [
        watcher.fail(rank, failed(rank, f"in {word}", kind="NaN"), num_left=PLENTY)
        for rank, word in enumerate("abc")
    ]
    assert whys == [
        None,
        None,
        "the first blocks of 3 ranks failed alike: block 2: BlockError: in c",
    ]
    watcher = breaker()
    for rank, kind in enumerate("abc"):
        assert watcher.fail(rank, failed(rank, kind=kind), num_left=PLENTY) is None


def test_different_errors_or_one_rank_alone_are_no_reason():
    watcher = breaker()
    for rank, word in enumerate("abcd"):
        assert watcher.fail(rank, failed(rank, f"error {word}"), num_left=PLENTY) is None
    watcher = breaker()
    for block in range(3):
        assert watcher.fail(2, failed(block), num_left=PLENTY) is None


def test_what_fails_first_does_not_count_once_a_block_is_done():
    watcher = breaker()
    watcher.succeed(0)
    for rank in range(4):
        assert watcher.fail(rank, failed(rank), num_left=PLENTY) is None


def test_many_in_a_row_on_more_than_one_rank():
    watcher = breaker(size=2, limit=5)
    watcher.succeed(0)
    for block in range(4):
        assert watcher.fail(block % 2, failed(block), num_left=PLENTY) is None
    watcher.succeed(0)
    for block in range(4):
        assert watcher.fail(block % 2, failed(block), num_left=PLENTY) is None
    why = watcher.fail(0, failed(9), num_left=PLENTY)
    assert why == "5 blocks in a row failed, the last one: block 9: BlockError: no such chunk"


def test_a_single_rank_on_which_all_fails_does_not_stop_the_others():
    watcher = breaker(size=2, limit=5)
    for block in range(50):
        assert watcher.fail(1, failed(block), num_left=PLENTY) is None
    assert watcher.fail(0, failed(50), num_left=PLENTY) is not None


def test_one_rank_alone_is_stopped_by_its_own_failures():
    watcher = breaker(size=1, limit=3)
    whys = [watcher.fail(0, failed(block), num_left=PLENTY) for block in range(3)]
    assert [why is None for why in whys] == [True, True, False]


def test_later_tries_and_the_last_blocks_are_no_reason():
    watcher = breaker(size=1, limit=3)
    for block in range(20):
        assert watcher.fail(0, failed(block, attempt=2), num_left=PLENTY) is None
    for block in range(20):
        assert watcher.fail(0, failed(block), num_left=3) is None
