"""A zipped package as a folder in the run directory, where every rank finds it.

Writes nothing outside that folder, whatever the archive says. Knows nothing of what is in it.
"""

import os
import re
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from mpichunk.errors import ModelError
from mpichunk.filehash import file_hash

_UNPACKED = re.compile(r".*/(model-[0-9a-f]{16}/.+)")


def unpack(archive: Path, run_dir: Path) -> Path:
    """Return the folder with the content of an archive, unpacked if it is not there yet.

    The folder's name has the archive's hash, and appears when all is in it: whoever sees it may
    use it.

    Raises:
        ModelError: the archive is damaged, wants to write elsewhere, or there is no room.
    """
    target = run_dir / f"model-{file_hash(archive)[:16]}"
    if target.is_dir():
        return target
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(archive) as members:
            for member in members.infolist():
                _refuse_escape(member, archive)
            temporary.mkdir(parents=True)
            members.extractall(temporary)
        temporary.rename(target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{archive} cannot be unpacked: {error}", key="model.path") from error
    except OSError as error:
        if target.is_dir():
            return target
        raise ModelError(
            f"{archive} cannot be unpacked into {target}: {error.strerror or error}; unpack it "
            "yourself and name the folder",
            key="model.path",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def path_in_archive(path: str) -> str | None:
    """Return the path of what `unpack` wrote from its folder on, None for any other path.

    The folder's name tells which archive it is, wherever the run directory lies.
    """
    match = _UNPACKED.fullmatch(path)
    return match and match[1]


def _refuse_escape(member: zipfile.ZipInfo, archive: Path) -> None:
    """Refuse a member that would be written, or lead, outside the folder."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if is_link or path.is_absolute() or ".." in path.parts or ":" in path.parts[:1]:
        what = "a symbolic link" if is_link else "outside its own folder"
        raise ModelError(
            f"{archive} has a member {member.filename!r}, {what}; it is not unpacked",
            key="model.path",
        )
