"""What lies where in a run directory, and how a small file is put there.

Names only; who writes a file knows what is in it. The archives that `config.described` unpacks lie
there too, in `model-<hash>`, and locks in `lock.<number>`.
"""

import secrets
from contextlib import suppress
from pathlib import Path

CONFIG = "config.yaml"
"""The effective config; `config.described` reads it by the same name."""

PLAN = "plan.json"
"""What `plan --json` says of it."""

JOURNAL = "journal.jsonl"
"""What is done."""

LOGS = "logs"
"""A folder: what each rank says."""

PROBE = "probe.json"
"""What one forward took, for `plan`."""

PEAK = "peak.json"
"""What memory a run took, for `plan`."""

STOP = "stop"
"""By this file a running job is asked to end."""

NONCE = ".nonce"
"""By this file ranks prove that they see the same run directory."""


def replace_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that readers never see half of it.

    Raises:
        OSError: it cannot be written.
    """
    # A name of its own: `bench` takes no lock, and a run may write at the same time.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        # What the user knows by name.
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
