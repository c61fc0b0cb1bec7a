"""Mirror images and rotations of a patch, and how predictions of them are brought back.

Pure arithmetic on voxel indices. Knows no arrays, no networks and no config.

A network that is given a turned patch answers for the turned voxels. Turned back, an ordinary
channel lies where it belongs. An affinity does not: it joins voxel v to v + offset, and the turned
voxels are joined the turned way. With offset -1 along z, and the patch flipped along z:

    straight     0 . 1 . 2 . 3          channel at v joins v-1 and v: a value at 1, 2 and 3
    turned back  0 . 1 . 2 . 3          channel at v joins v and v+1: a value at 0, 1 and 2

So it is read one voxel aside, and at voxel 0, to which no turned voxel answers, it is left out of
the mean.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mpichunk.geometry.box import Slices, Triple, triple

Flips = tuple[bool, bool, bool]
Offsets = Mapping[int, Triple]
"""Channels that hold affinities, and which neighbour (zyx) each joins a voxel to."""

NAMES = ("flip_z", "flip_y", "flip_x", "rot90")


@dataclass(frozen=True, slots=True, order=True)
class PatchTurn:
    """One symmetry of a box: flips of axes, then perhaps an exchange of y and x."""

    swaps_yx: bool = False
    """Whether y and x change places, after the flips."""

    flips: Flips = (False, False, False)
    """Whether the z, y and x axes are reversed."""

    @property
    def flipped(self) -> tuple[int, ...]:
        """Axes that are reversed, counted from the last: -3 is z."""
        return tuple(axis - 3 for axis in range(3) if self.flips[axis])

    def then(self, other: "PatchTurn") -> "PatchTurn":
        """Return this turn followed by another one."""
        flips = tuple(
            a != b for a, b in zip(self.flips, _swapped(other.flips, self.swaps_yx), strict=True)
        )
        z, y, x = flips
        return PatchTurn(self.swaps_yx != other.swaps_yx, (z, y, x))

    def of(self, offset: Triple) -> Triple:
        """Return where an offset between two voxels points once they are turned."""
        z, y, x = (-d if flip else d for d, flip in zip(offset, self.flips, strict=True))
        return (z, x, y) if self.swaps_yx else (z, y, x)


STRAIGHT = PatchTurn()
"""Nothing is turned."""

_GENERATORS: Mapping[str, PatchTurn] = {
    "flip_z": PatchTurn(flips=(True, False, False)),
    "flip_y": PatchTurn(flips=(False, True, False)),
    "flip_x": PatchTurn(flips=(False, False, True)),
    "rot90": PatchTurn(swaps_yx=True, flips=(False, False, True)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Where values of a prediction that was turned back belong: total[target] += back[source]."""

    target: slice
    """Channels of the mean."""

    source: slice
    """As many channels of the prediction."""

    where: Slices
    """Voxels of the mean."""

    part: Slices
    """As many voxels of the prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Where the sum over all turns must be multiplied by what to become the mean."""

    channels: slice
    part: Slices
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """A group of turns, and the way back from each."""

    turns: tuple[PatchTurn, ...]
    """All of them, the straight one first."""

    moves: tuple[tuple[Move, ...], ...]
    """For each turn."""

    shares: tuple[Share, ...]
    """To be applied in order once all turns are summed."""

    @classmethod
    def make(
        cls, names: Iterable[str], *, num_channels: int, offsets: Offsets, shape: Triple
    ) -> "Augmentation":
        """Return the augmentation by the group that these symmetries generate.

        Args:
            names: some of `NAMES`.
            num_channels: channels of the prediction.
            offsets: those of them that hold affinities.
            shape: voxels of the prediction of one patch.

        Raises:
            ValueError: see `partner`.
        """
        turns = turns_of(names)
        whole = _region((0, 0, 0), shape)
        shares = [Share(channels=slice(num_channels), part=whole, factor=1 / len(turns))]
        for channel, offset in sorted(offsets.items()):
            num_short = sum(partner(turn, channel, offsets)[1] for turn in turns)
            if num_short:
                factor = len(turns) / (len(turns) - num_short)
                shares += [
                    Share(channels=slice(channel, channel + 1), part=part, factor=factor)
                    for part in _unanswered(offset, shape)
                ]
        return cls(
            turns=turns,
            moves=tuple(tuple(_moves(turn, num_channels, offsets, shape)) for turn in turns),
            shares=tuple(shares),
        )


def turns_of(names: Iterable[str]) -> tuple[PatchTurn, ...]:
    """Return every turn that these symmetries generate, each once; the straight one is the first.

    The same for any order of the names. All three flips and `rot90` together generate 16 turns.
    """
    found, new = {STRAIGHT}, {STRAIGHT}
    generators = [_GENERATORS[name] for name in names]
    while new:
        new = {turn.then(generator) for turn in new for generator in generators} - found
        found |= new
    return tuple(sorted(found))


def partner(turn: PatchTurn, channel: int, offsets: Offsets) -> tuple[int, bool]:
    """Return which channel of a turned prediction answers for a channel, and whether backwards.

    Backwards: it joins the same two voxels, but stands at the other one of them.

    Raises:
        ValueError: no channel joins the turned voxels.
    """
    if channel not in offsets:
        return channel, False
    wanted = turn.of(offsets[channel])
    opposite = triple([-d for d in wanted])
    # Its own channel first, so that two channels of one offset stay apart where nothing is swapped.
    for candidate in (channel, *sorted(offsets)):
        if offsets[candidate] in (wanted, opposite):
            return candidate, offsets[candidate] == opposite
    raise ValueError(f"no channel has the offset {list(wanted)} or {list(opposite)}")


def _moves(turn: PatchTurn, num_channels: int, offsets: Offsets, shape: Triple) -> Iterator[Move]:
    """Yield the way back from one turn; neighbouring channels that go the same way go together."""
    channel = 0
    while channel < num_channels:
        source, is_backwards = partner(turn, channel, offsets)
        stop = channel + 1
        if not is_backwards:
            while stop < num_channels and partner(turn, stop, offsets) == (
                source + stop - channel,
                False,
            ):
                stop += 1
        offset = offsets[channel] if is_backwards else (0, 0, 0)
        start = triple([max(0, -d) for d in offset])
        end = triple([min(n, n - d) for n, d in zip(shape, offset, strict=True)])
        moved = [(a + d, b + d) for a, b, d in zip(start, end, offset, strict=True)]
        yield Move(
            target=slice(channel, stop),
            source=slice(source, source + stop - channel),
            where=_region(start, end),
            part=_region(triple([a for a, _ in moved]), triple([b for _, b in moved])),
        )
        channel = stop


def _unanswered(offset: Triple, shape: Triple) -> Iterator[Slices]:
    """Yield, without overlap, the voxels whose neighbour by `offset` is outside."""
    inner = [slice(max(0, -d), max(0, min(n, n - d))) for n, d in zip(shape, offset, strict=True)]
    for axis, (n, d) in enumerate(zip(shape, offset, strict=True)):
        if d:
            outer = slice(0, min(n, -d)) if d < 0 else slice(max(0, n - d), n)
            whole = [slice(0, m) for m in shape]
            parts = [*inner[:axis], outer, *whole[axis + 1 :]]
            yield parts[0], parts[1], parts[2]


def _region(start: Triple, stop: Triple) -> Slices:
    """Return the slices from start to stop; empty where stop is not above start."""
    z, y, x = (slice(a, max(a, b)) for a, b in zip(start, stop, strict=True))
    return z, y, x


def _swapped(flips: Sequence[bool], swaps: bool) -> Flips:
    """Return the flips with y and x exchanged if so."""
    z, y, x = flips
    return (z, x, y) if swaps else (z, y, x)
