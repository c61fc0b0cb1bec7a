"""Ranks that do not see the run directory of the others."""

from typing import Any

import pytest

from mpichunk.errors import LaunchError
from mpichunk.job.shared_filesystem import SIGHT_SECONDS, check_sight
from mpichunk.rundir.layout import NONCE


class Clock:
    """Seconds that pass when somebody sleeps; at some of them something happens."""

    def __init__(self, **happenings: Any) -> None:
        self.now, self.happenings = 0.0, happenings

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for name, happening in self.happenings.items():
            if self.now >= float(name.removeprefix("at_")):
                happening()


def test_a_run_directory_may_come_late(tmp_path):
    def appear() -> None:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / NONCE).write_text("abc")

    clock = Clock(at_20=appear)
    check_sight(tmp_path / "run", "abc", host="node7", clock=clock, sleep=clock.sleep)
    assert 20 <= clock.now < 21


@pytest.mark.parametrize(
    ("content", "found"), [(None, "it is not there"), ("another run's", "another one is there")]
)
def test_a_run_directory_of_another_node_is_refused(tmp_path, content, found):
    if content is not None:
        (tmp_path / NONCE).write_text(content)
    clock = Clock()
    with pytest.raises(LaunchError, match="host node7 does not see the run directory") as refused:
        check_sight(tmp_path, "abc", host="node7", clock=clock, sleep=clock.sleep)
    assert found in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert refused.value.key == "run_dir"
    assert SIGHT_SECONDS < clock.now < SIGHT_SECONDS + 1
