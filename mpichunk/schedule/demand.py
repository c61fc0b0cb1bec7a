"""Which ranks want how many more blocks, and which of them may get some now.

Knows no blocks: who may hold how many is the scheduler's.

    asks -> ready -- looked at --> served, or not ready until it gives a block back ...
              ^                                            ... or some come free elsewhere
              '--------------------------------------------'
"""


class Demand:
    """In the order in which the ranks have asked; a turn looks only at those that are ready."""

    def __init__(self) -> None:
        self._wanted: dict[int, int] = {}
        self._parked: dict[int, int] = {}
        self._ready: dict[int, None] = {}
        self._are_all_ready = False

    def __len__(self) -> int:
        return len(self._wanted)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those that want blocks, in the order in which they asked."""
        return tuple(self._wanted)

    def of(self, rank: int) -> int:
        """Return how many more blocks a rank wants."""
        return self._wanted.get(rank, 0)

    def add(self, rank: int, num_blocks: int) -> None:
        """Note that a rank wants so many more, and that it has asked last."""
        queue = self._parked if rank in self._parked else self._wanted
        queue[rank] = queue.pop(rank, 0) + num_blocks
        self._ready[rank] = None

    def serve(self, rank: int, num_blocks: int) -> None:
        """Note that a rank has got so many."""
        self._wanted[rank] -= num_blocks
        if self._wanted[rank] == 0:
            del self._wanted[rank]

    def look_at(self, rank: int) -> None:
        """Look at a rank in the next turn: it holds less than it did."""
        self._ready[rank] = None

    def look_at_all(self) -> None:
        """Look at every rank that wants blocks in the next turn: some have come free."""
        # Noted only: in one turn many ranks may give blocks back.
        self._are_all_ready = True

    def take_ready(self) -> list[int]:
        """Return those that may get blocks now; they are looked at once."""
        ready, self._ready = self._ready, {}
        if self._are_all_ready:
            ready |= dict.fromkeys(self._wanted)
            self._are_all_ready = False
        return [rank for rank in ready if rank in self._wanted]

    def park(self, rank: int) -> None:
        """Give a rank nothing until it comes back; what it asks for meanwhile is added."""
        self._parked[rank] = self._wanted.pop(rank, 0) + self._parked.get(rank, 0)

    def unpark(self, rank: int) -> int:
        """Return what a rank wants that has come back; it does not ask twice for the same."""
        return self._parked.pop(rank, 0)

    def drop(self, rank: int) -> None:
        """Forget what a rank wants."""
        self._wanted.pop(rank, None)

    def clear(self) -> None:
        """Forget all: everybody asks again."""
        self._wanted.clear()
        self._parked.clear()
        self._ready.clear()
        self._are_all_ready = False
