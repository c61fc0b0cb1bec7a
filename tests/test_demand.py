from mpichunk.schedule.demand import Demand


def start(**wanted):
    demand = Demand()
    for rank, num_blocks in wanted.items():
        demand.add(int(rank[1:]), num_blocks)
    return demand


def test_a_turn_looks_once_at_who_has_asked_in_their_order():
    demand = start(r3=2, r1=5)
    assert demand.take_ready() == [3, 1]
    assert demand.take_ready() == []
    assert (demand.of(3), demand.of(1), demand.of(7)) == (2, 5, 0)


def test_who_holds_less_or_asks_more_is_looked_at_again_and_who_wants_nothing_is_not():
    demand = start(r3=2, r1=5, r2=1)
    demand.take_ready()
    demand.serve(3, 2)
    for rank in (1, 3):
        demand.look_at(rank)
    assert demand.take_ready() == [1]
    demand.look_at_all()
    assert demand.take_ready() == [1, 2]
    demand.add(1, 1)
    assert demand.ranks == (2, 1), "asked last, served last"
    assert demand.take_ready() == [1]
    assert demand.of(1) == 6


def test_a_rank_that_is_away_is_not_looked_at_and_asks_not_twice():
    demand = start(r1=5)
    demand.park(1)
    demand.add(1, 2)
    assert demand.take_ready() == []
    assert len(demand) == 0
    assert demand.unpark(1) == 7
    assert demand.unpark(1) == 0


def test_all_is_forgotten():
    demand = start(r1=5, r2=1)
    demand.park(2)
    demand.clear()
    assert (len(demand), demand.take_ready(), demand.unpark(2)) == (0, [], 0)
