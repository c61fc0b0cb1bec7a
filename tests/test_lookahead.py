from hypothesis import given
from hypothesis import strategies as st

from mpichunk.schedule.lookahead import (
    LOOKAHEAD_SECONDS,
    MOST_WAITING,
    SPREAD,
    STALE_SECONDS,
    Lookahead,
)

SECONDS = st.floats(0.0, 1000.0)


def of(*seconds, now=0.0):
    lookahead = Lookahead()
    lookahead.move(now)
    for each in seconds:
        lookahead.note(each)
    return lookahead


def test_nothing_waits_before_anything_is_known_or_where_blocks_take_long():
    assert of().num_wanted(0.0) == 0
    assert of(0.3).num_wanted(0.0) == 0
    assert of(30.0).num_wanted(0.0) == 0


@given(st.lists(SECONDS, min_size=1, max_size=50))
def test_what_waits_is_bounded_and_soon_done_by_the_slowest_block(seconds):
    num_wanted = of(*seconds).num_wanted(0.0)
    assert 0 <= num_wanted <= MOST_WAITING
    assert num_wanted * min(seconds) <= LOOKAHEAD_SECONDS * 1.001
    if max(seconds) * MOST_WAITING <= LOOKAHEAD_SECONDS:
        assert num_wanted == MOST_WAITING


@given(SECONDS, st.integers(0, 2 * MOST_WAITING), st.floats(0.0, 10.0))
def test_what_is_given_back_leaves_what_is_wanted(seconds, num_waiting, now):
    lookahead = of(seconds)
    num_wanted = lookahead.num_wanted(now)
    excess = lookahead.num_excess(num_waiting, now)
    assert excess in {0, num_waiting - num_wanted}
    assert num_waiting - excess <= SPREAD * num_wanted
    if now > STALE_SECONDS:
        assert excess == num_waiting


def test_blocks_that_get_slow_are_noticed_after_a_few():
    lookahead = of(0.001)
    assert lookahead.num_wanted(0.0) == 250
    for _ in range(3):
        lookahead.note(10.0)
    assert lookahead.num_excess(250, 0.0) == 250
