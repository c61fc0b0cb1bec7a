"""Who starts tests/slurm without what they need is told what that is."""

import os

from tests.slurm import cluster


def test_why_no_slurm_can_be_started(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cluster.why_not() == "no Slurm here: only root can start one"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(cluster, "find_program", lambda name: None if name == "munged" else name)
    reason = cluster.why_not()
    assert reason is not None
    assert reason.startswith("no Slurm here: munged not found (Debian, Ubuntu: apt-get install")


def test_ports_are_free_and_different():
    ports = cluster._free_ports(5)
    assert len(set(ports)) == 5
