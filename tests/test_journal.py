import json
import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpichunk.errors import JournalError
from mpichunk.geometry.box import Box
from mpichunk.job.startup import changed_versions, library_versions
from mpichunk.rundir import journal as journals
from mpichunk.rundir.journal import (
    Journal,
    read_header,
    scan,
)
from mpichunk.schedule.messages import Done, Failed, Lease, State
from tests.journals import read_history, read_states

CORE = Box(start=(-3, 0, 64), stop=(61, 64, 128))
FINGERPRINT = {"input": "file:///em", "patch.shape": (20, 256, 256), "model": {"sha256": "ab"}}
VERSIONS = {"numpy": "2.4.6", "torch": "2.13.0"}


def open_journal(run_dir, num_blocks=10, **kwargs):
    kwargs = {"fingerprint": FINGERPRINT, "versions": VERSIONS, "clock": lambda: 1.5} | kwargs
    return Journal.open(run_dir, num_blocks=num_blocks, **kwargs)


def done(block, attempt=1):
    return Done(
        lease=Lease(block=block, attempt=attempt),
        num_patches=48,
        num_voxels=64**3,
        nbytes_read=10,
        nbytes_written=20,
        seconds={"read": 0.81234567, "infer": 12.3, "write": 0.5},
        checksum="xxh3:00112233445566778899aabbccddeeff",
    )


def failed(block, message="no such chunk"):
    lease = Lease(block=block, attempt=3)
    return Failed(lease=lease, error="BlockError", message=message)


def append(journal, record, state):
    journal.append(record, state, core=CORE, rank=3, host="node7")


states_of = partial(read_states, num_blocks=10)


def test_lines_are_as_documented(tmp_path):
    with open_journal(tmp_path) as journal:
        journal.append_start({"num_ranks": 4})
        append(journal, done(7), "done")
        append(journal, failed(8, 'a "quoted"\nmessage'), "failed")
    header, start, first, second = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert list(json.loads(header)) == ["format", "fingerprint", "num_blocks", "versions", "time"]
    assert json.loads(start) == {"start": {"time": 1.5, "num_done": 0, "num_ranks": 4}}
    assert first.startswith('{"stage":"blocks","block":7,"state":"done",')
    assert json.loads(first) == {
        "stage": "blocks",
        "block": 7,
        "state": "done",
        "core": [[-3, 0, 64], [61, 64, 128]],
        "rank": 3,
        "host": "node7",
        "attempt": 1,
        "time": 1.5,
        "seconds": {"read": 0.8123, "infer": 12.3, "write": 0.5},
        "num_patches": 48,
        "checksum": "xxh3:00112233445566778899aabbccddeeff",
    }
    assert json.loads(second)["message"] == 'a "quoted"\nmessage'


TEXT = st.text(max_size=20)
NUMBER = st.integers(0, 2**63)
STAGE_SECONDS = st.dictionaries(TEXT, st.floats(0, 1e9), max_size=4)


@given(TEXT, TEXT, STAGE_SECONDS, NUMBER, st.none() | st.integers(1, 99))
def test_lines_written_by_hand_are_those_of_a_json_encoder(text, host, seconds, number, batch_size):
    lease = Lease(block=number, attempt=2)
    counts = dict.fromkeys(("num_patches", "num_voxels", "nbytes_read", "nbytes_written"), number)
    record = Done(lease=lease, seconds=seconds, checksum=text, batch_size=batch_size, **counts)
    head = {"stage": "blocks", "block": number, "state": "done", "core": [CORE.start, CORE.stop]}
    head |= {"rank": 3, "host": host, "attempt": 2, "time": 1760000000.123}
    tail = {"seconds": {stage: round(s, 4) for stage, s in seconds.items()}, "num_patches": number}
    tail |= {} if batch_size is None else {"batch_size": batch_size}
    line = journals._block_line(record, "done", core=CORE, rank=3, host=host, time=1760000000.123)
    assert line == journals._encode(head | tail | {"checksum": text})
    record = Failed(lease=lease, error=text, message=host)
    line = journals._block_line(record, "done", core=CORE, rank=3, host=host, time=1760000000.123)
    assert line == journals._encode(head | {"error": text, "message": host})


def test_nothing_is_written_before_sync(tmp_path):
    path = tmp_path / "journal.jsonl"
    with open_journal(tmp_path) as journal:
        before = path.read_bytes()
        append(journal, done(1), "done")
        append(journal, done(2), "done")
        assert path.read_bytes() == before
        journal.sync()
        assert path.read_bytes().count(b"\n") == 3


def test_a_new_start_knows_what_was_done(tmp_path):
    with open_journal(tmp_path) as journal:
        journal.append_start({"num_ranks": 4})
        append(journal, done(1), "done")
        append(journal, failed(2), "failed")
        append(journal, failed(3), "retry")
    with open_journal(tmp_path) as journal:
        assert journal.states.tolist() == [0, State.DONE, State.FAILED] + [0] * 7
        journal.append_start({"num_ranks": 2})
    starts = read_history(tmp_path / "journal.jsonl").starts
    assert [start["num_ranks"] for start in starts] == [4, 2]
    assert [start["num_done"] for start in starts] == [0, 1]


def test_the_last_line_about_a_block_counts(tmp_path):
    with open_journal(tmp_path) as journal:
        for state in ("failed", "done", "done", "retry", "failed", "done"):
            append(journal, done(4), state)
        append(journal, done(5), "done")
        append(journal, done(5), "retry")
    assert states_of(tmp_path)[4] == State.DONE
    assert states_of(tmp_path)[5] == State.PENDING


def test_a_last_line_torn_at_any_byte_does_not_exist(tmp_path):
    with open_journal(tmp_path) as journal:
        append(journal, done(1), "done")
        append(journal, done(2), "done")
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        assert states_of(tmp_path).tolist() == [0, State.DONE] + [0] * 8
        open_journal(tmp_path).close()
        assert path.read_bytes() == whole[:last]
        path.write_bytes(whole[:end])
        with open_journal(tmp_path) as journal:
            assert journal.states[2] == State.PENDING
            append(journal, done(3), "done")
        assert path.read_bytes().startswith(whole[:last] + b'{"stage":"blocks","block":3,')
        assert states_of(tmp_path).tolist() == [0, State.DONE, 0, State.DONE] + [0] * 6


def test_a_header_torn_at_any_byte_is_begun_again(tmp_path):
    open_journal(tmp_path).close()
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        open_journal(tmp_path).close()
        assert path.read_bytes() == whole


def test_a_line_without_its_end_in_the_middle_is_passed_over(tmp_path):
    with open_journal(tmp_path) as journal:
        append(journal, done(1), "done")
    path = tmp_path / "journal.jsonl"
    torn = b'{"stage":"blocks","block":5,"state":"done","core":[[0,\n'
    path.write_bytes(path.read_bytes() + torn + b"\0\0\0\n")
    assert np.flatnonzero(states_of(tmp_path)).tolist() == [1]


def test_lines_are_found_however_the_file_is_cut_into_pieces(tmp_path, monkeypatch):
    with open_journal(tmp_path, num_blocks=50) as journal:
        for block in range(50):
            append(journal, failed(block) if block % 3 else done(block), "failed")
    monkeypatch.setattr(journals, "CHUNK_NBYTES", 97)
    states = read_states(tmp_path, 50)
    assert (states == State.FAILED).all()
    states[3] = State.DONE
    history = read_history(tmp_path / "journal.jsonl")
    found = history.failures(np.where(np.arange(50) % 3, states, 0))
    assert [failure.block for failure in found] == [b for b in range(50) if b % 3]


def test_scan_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "journal.jsonl"
    with open_journal(tmp_path) as journal:
        states = np.zeros(10, np.uint8)
        append(journal, done(1), "done")
        journal.sync()
        end = scan(path, states)
        assert end == path.stat().st_size
        with path.open("ab") as file:
            file.write(b'{"stage":"blocks","block":9,"sta')
        assert scan(path, states, end) == end
        with path.open("ab") as file:
            file.write(b'te":"done","core":[]}\n')
        assert scan(path, states, end) == path.stat().st_size
    assert np.flatnonzero(states).tolist() == [1, 9]


def test_failures_are_read_with_their_causes(tmp_path):
    with open_journal(tmp_path) as journal:
        append(journal, failed(6, "first"), "failed")
        append(journal, failed(6, "second"), "failed")
        append(journal, failed(2, "later done"), "failed")
        append(journal, failed(1, "tried again"), "retry")
        append(journal, failed(5), "failed")
        append(journal, done(2), "done")
    first, second = read_history(tmp_path / "journal.jsonl").failures(states_of(tmp_path))
    assert (first.block, second.block, second.message) == (5, 6, "second")
    assert (first.core, first.rank, first.host, first.attempt) == (CORE, 3, "node7", 3)


def test_another_fingerprint_is_refused_with_the_differing_keys(tmp_path):
    with open_journal(tmp_path) as journal:
        append(journal, done(1), "done")
    whole = (tmp_path / "journal.jsonl").read_bytes()
    other = FINGERPRINT | {"patch.shape": (20, 128, 128), "mask": "file:///m"}
    with pytest.raises(JournalError) as caught:
        open_journal(tmp_path, fingerprint=other)
    message = str(caught.value)
    assert "patch.shape: [20, 256, 256] then, [20, 128, 128] now" in message
    assert "mask: null then" in message
    assert "input" not in message
    assert "--fresh" in message
    assert (tmp_path / "journal.jsonl").read_bytes() == whole
    with pytest.raises(JournalError, match="number of blocks"):
        open_journal(tmp_path, num_blocks=11)


def test_a_journal_of_another_run_without_a_finished_block_is_set_aside(tmp_path):
    open_journal(tmp_path).close()
    with open_journal(tmp_path, fingerprint=FINGERPRINT | {"mask": "file:///m"}) as journal:
        assert journal.header["fingerprint"]["parts"]["mask"] == "file:///m"
    assert (tmp_path / "journal.1.jsonl").exists()


def test_fresh_sets_the_old_journal_aside(tmp_path):
    for _ in range(3):
        with open_journal(tmp_path, fresh=True) as journal:
            assert not journal.states.any()
            append(journal, done(1), "done")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["journal.1.jsonl", "journal.2.jsonl", "journal.jsonl"]
    assert b'"block":1' in (tmp_path / "journal.1.jsonl").read_bytes()


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", '{"format":"mpichunk-journal-0"}\n'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "journal.jsonl"
    path.write_text(content)
    with pytest.raises(JournalError, match="first line"):
        open_journal(tmp_path)
    assert path.read_text() == content


def test_a_run_directory_that_cannot_be_written_is_the_user_s_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be written") as caught:
        open_journal(tmp_path / "file" / "run")
    assert caught.value.key == "run_dir"
    (tmp_path / "run" / "journal.jsonl").mkdir(parents=True)
    with pytest.raises(JournalError, match="cannot be read"):
        open_journal(tmp_path / "run")


def test_a_block_that_the_plan_does_not_have_is_refused(tmp_path):
    with open_journal(tmp_path) as journal:
        append(journal, done(10), "done")
    with pytest.raises(JournalError, match="block 10, but the plan has 10"):
        states_of(tmp_path)


def write_half(file, text):
    file.write(text[: len(text) // 2])
    raise OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_whole_lines(tmp_path, monkeypatch):
    with open_journal(tmp_path) as journal:
        append(journal, done(1), "done")
        journal.sync()
        whole = (tmp_path / "journal.jsonl").read_bytes()
        append(journal, done(2), "done")
        with monkeypatch.context() as patch:
            patch.setattr(journals, "_write_durably", write_half)
            with pytest.raises(OSError, match="No space"):
                journal.sync()
        assert (tmp_path / "journal.jsonl").read_bytes() == whole
        journal.sync()
    assert np.flatnonzero(states_of(tmp_path)).tolist() == [1, 2]


def test_two_that_write_at_the_same_time_overwrite_nothing(tmp_path):
    with open_journal(tmp_path) as first:
        append(first, done(1), "done")
        first.sync()
        with open_journal(tmp_path) as second:
            append(second, done(2), "done")
            append(second, done(3), "done")
            second.sync()
            append(first, done(4), "done")
            first.sync()
            append(second, done(5), "done")
            second.sync()
    assert np.flatnonzero(states_of(tmp_path)).tolist() == [1, 2, 3, 4, 5]
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert sum(bool(json.loads(line)) for line in lines if line) == 6
    assert read_history(tmp_path / "journal.jsonl").starts == []


@pytest.mark.parametrize("share", [0.3, 0.5, 0.999])
def test_half_a_line_of_another_writer_takes_no_line_with_it(tmp_path, share):
    path = tmp_path / "journal.jsonl"
    with open_journal(tmp_path) as journal:
        append(journal, done(1), "done")
        journal.sync()
        start = path.stat().st_size
        append(journal, done(2), "done")
        journal.sync()
        line = path.read_bytes()[start:].replace(b'"block":2', b'"block":8')
        with path.open("ab") as file:
            file.write(line[: int(share * len(line))])
        append(journal, failed(3), "failed")
        append(journal, done(4), "done")
        journal.sync()
    states = states_of(tmp_path)
    assert states[[1, 2, 3, 4]].tolist() == [State.DONE, State.DONE, State.FAILED, State.DONE]
    assert [failure.block for failure in read_history(path).failures(states)] == [3]


def test_a_write_that_fails_cuts_off_no_line_of_another_writer(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"

    def write_half_meanwhile(file, text):
        file.write(text[: len(text) // 2])
        with path.open("ab") as other:
            other.write(b"\n" + line)
        raise OSError(28, "No space left on device")

    with open_journal(tmp_path) as journal:
        start = path.stat().st_size
        append(journal, done(1), "done")
        journal.sync()
        line = path.read_bytes()[start:].replace(b'"block":1', b'"block":8')
        append(journal, done(2), "done")
        with monkeypatch.context() as patch:
            patch.setattr(journals, "_write_durably", write_half_meanwhile)
            with pytest.raises(OSError, match="No space"):
                journal.sync()
        journal.sync()
    assert np.flatnonzero(states_of(tmp_path)).tolist() == [1, 2, 8]


def test_other_versions_are_told(tmp_path):
    open_journal(tmp_path).close()
    header = read_header(tmp_path / "journal.jsonl")
    assert changed_versions(header, VERSIONS) == []
    (line,) = changed_versions(header, VERSIONS | {"numpy": "3.0", "new": "1"})
    assert line == "numpy 2.4.6 when the run began, now 3.0"


def test_run_of_a_version_that_rounded_otherwise_is_told():
    (line,) = changed_versions({"versions": {"mpichunk": "0.1.0"}}, library_versions())
    assert line.startswith("mpichunk 0.1.0 when the run began, now ")


def test_many_blocks_are_resumed_quickly(tmp_path):
    num = 200_000
    open_journal(tmp_path, num_blocks=num).close()
    path = tmp_path / "journal.jsonl"
    with open_journal(tmp_path / "one") as journal:
        append(journal, done(123456), "done")
    line = (tmp_path / "one" / "journal.jsonl").read_bytes().splitlines(keepends=True)[1]
    with path.open("ab") as file:
        file.writelines(line.replace(b"123456", b"%d" % block) for block in range(num))
    start = time.perf_counter()
    with open_journal(tmp_path, num_blocks=num) as journal:
        assert (journal.states == State.DONE).all()
    assert time.perf_counter() - start < 2.0  # 0.2 s on an idle core
