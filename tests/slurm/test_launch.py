"""Ranks started by srun and by mpirun in an allocation write the bytes of a serial run."""

import pytest

from mpichunk import cli
from tests.endtoend import assert_same_files, block_lines, check, start_lines, status_of
from tests.faults.slow import NUM_BLOCKS, slow_config
from tests.slurm.site import openmpi_under_srun, told

NODES = ("--nodes=4", "--ntasks-per-node=2")


def assert_complete(config, undisturbed, capsys, *, num_ranks=8):
    assert check(config) == 0
    run_dir = config.parent / "runs/v"
    blocks = [line["block"] for line in block_lines(run_dir)]
    assert sorted(blocks) == list(range(NUM_BLOCKS))
    start = start_lines(run_dir)[-1]
    assert (start["num_ranks"], len(start["hosts"])) == (num_ranks, num_ranks // 2)
    assert_same_files(config.parent / "out/v.zarr", undisturbed)
    return start


@pytest.mark.parametrize(("mpi", "flavour"), [("pmix", "openmpi"), ("pmi2", "mpich")])
def test_srun(cluster, request, folder, undisturbed, capsys, mpi, flavour):
    site = request.getfixturevalue(flavour)
    config = slow_config(folder)
    env = openmpi_under_srun(site) if flavour == "openmpi" else {}
    done = cluster.run(
        *("srun", *NODES, f"--mpi={mpi}", "--time=30", site.python, "-m", "mpichunk", "run"),
        config,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    start = assert_complete(config, undisturbed, capsys)
    assert {"pmix": "Open MPI", "pmi2": "MPICH"}[mpi] in done.stderr

    # The job is in the journal, with an end that this Slurm tells only when asked.
    slurm = start["slurm"]
    assert (slurm["step"], slurm["num_restarts"], slurm["partition"]) == ("0", 0, "all")
    assert 1500 < slurm["end_time"] - start["time"] <= 1810
    found = status_of(config, capsys)
    assert found["slurm"] == slurm
    assert cli.main(["status", str(config)]) == 0
    assert f"Slurm job {slurm['job']}.0, partition all, cluster mpichunk, ends 20" in (
        capsys.readouterr().out
    )


def test_mpirun_with_fault_tolerance_in_an_allocation(
    cluster, openmpi, folder, undisturbed, capsys
):
    config = slow_config(folder)
    done = cluster.run(
        *("salloc", "--no-kill", *NODES, "--time=30"),
        *("mpirun", "--with-ft", "ulfm", "--map-by", "ppr:2:node", "--bind-to", "none"),
        *(openmpi.python, "-m", "mpichunk", "run", config),
        env=told(folder, 0.1),
    )
    assert done.returncode == 0, done.stderr
    start = assert_complete(config, undisturbed, capsys)
    assert start["slurm"]["job"].isdigit()


def test_tasks_that_do_not_find_one_another_are_refused(cluster, openmpi, folder):
    config = slow_config(folder)
    command = [openmpi.python, "-m", "mpichunk", "run", config]
    done = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "--mpi=none", *command)
    assert done.returncode == 2, done.stderr
    assert "srun started 4 tasks (SLURM_STEP_NUM_TASKS=4), but MPI sees a world of one" in (
        done.stderr
    )
    assert not (folder / "out").exists()


def test_ranks_take_their_cores_from_the_mask(cluster, openmpi, folder):
    config = slow_config(folder)
    command = [openmpi.python, "-m", "mpichunk", "run", config]
    env = openmpi_under_srun(openmpi)
    place = ("srun", "--nodes=2", "--mpi=pmix")
    masks = []
    for how in (("--ntasks-per-node=2",), ("--ntasks-per-node=1", "-c2")):
        done = cluster.run(*place, *how, *command, "--fresh", env=env)
        assert done.returncode == 0, done.stderr
        rows = [line.split()[1:] for line in done.stderr.splitlines() if " cpu " in line]
        masks.append([(row[3], row[4]) for row in rows if row[0].isdigit()])
    assert masks == [[("1", "1")] * 4, [("2", "2")] * 2]
    assert start_lines(folder / "runs/v")[-1]["threads"] == 2
