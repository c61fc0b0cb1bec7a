"""What one who takes over reads in the journal."""

from dataclasses import replace

from mpichunk.geometry.box import Box
from mpichunk.rundir.history import read_tries
from mpichunk.rundir.journal import Journal
from mpichunk.schedule.messages import RANK_LOST, Failed, Lease
from tests.blocks import done

CORE = Box.from_shape((0, 0, 0), (1, 1, 1))


def note(journal, record, state, rank=0):
    journal.append(record, state, core=CORE, rank=rank, host="node")


def failed(block, error="BlockError"):
    return Failed(lease=Lease(block=block, attempt=1), error=error, message='"state":"failed"')


def test_tries_and_deaths_of_the_latest_start(tmp_path):
    with Journal.open(tmp_path, num_blocks=20, fingerprint={}, versions={}) as journal:
        note(journal, failed(1), "retry", rank=9)
        journal.append_start({})
        note(journal, failed(1), "retry", rank=2)
        note(journal, failed(1), "retry", rank=3)
        note(journal, failed(4, RANK_LOST), "retry", rank=1)
        note(journal, failed(5, RANK_LOST), "failed", rank=1)
        note(journal, failed(6), "undone")
        journal.sync()
        tries = read_tries(journal.path)
    assert tries.failed_on == {1: [2, 3]}
    assert tries.died_on == {4: [1]}
    assert tries.given_up == [5]


def test_the_checksum_is_that_of_the_last_line_of_this_block_since_it_is_noted(tmp_path):
    with Journal.open(tmp_path, num_blocks=20, fingerprint={}, versions={}) as journal:
        note(journal, done(Lease(block=3, attempt=1)), "done")
        journal.sync()
        offsets = journal.offsets
        offsets.begin()
        for block, digits in ((12, "0"), (1, "1"), (12, "2")):
            record = replace(done(Lease(block=block, attempt=1)), checksum=f"xxh3:{digits}")
            note(journal, record, "done")
        note(journal, failed(2), "retry")
        journal.sync()
        with journal.path.open("ab") as file:
            file.write(b'{"torn by anoth')
        note(journal, replace(done(Lease(block=4, attempt=1)), checksum="xxh3:4"), "done")
        journal.sync()
        offsets.begin()
        found = [offsets.checksum(block) for block in (1, 2, 3, 4, 12)]
    assert found == ["xxh3:1", None, None, "xxh3:4", "xxh3:2"]
