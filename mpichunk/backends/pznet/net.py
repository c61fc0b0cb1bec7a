"""A compiled pznet in this process: loaded without the harm that its engine does around it.

Its C code ends the process instead of raising, binds threads to the first cores of the node, and
prints on standard output. Run as a program (`python -m`), it tries a net in a process that may end.
Knows no configuration.
"""

import importlib.util
import json
import os
import re
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpichunk.errors import ModelError
from mpichunk.words import count

JIT = Path("cpp/include/znn/jit/jit.py")
"""What the engine runs below $ZNNPHI_PATH, once per convolution, for the path of its library."""

_TASKS = Path("/proc/self/task")
_RESOLVER = """\
#!/bin/sh
''':'
exec {python} -S "$0" "$@"
'''
import os, sys

pairs = (argument.split("=", 1) for argument in sys.argv[1:])
given = {{key.lower(): value for key, value in pairs}}
folder, layer = given.pop("lib_folder"), given.pop("layer")
path = os.path.join(folder, "_".join([layer] + [given[key] for key in sorted(given)]) + ".so")
if not os.path.exists(path):
    sys.stderr.write("mpichunk: the net needs " + path + ", which is not there\\n")
print(path)
"""
"""A shell script and Python at once, so that no Python need be on the path."""

_loaded: "list[PznetNet]" = []
_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class PznetFiles:
    """Where the parts of a compiled net are."""

    library: Path
    """The extension module."""

    weights: tuple[Path, ...]
    """Its weights, a file for each tensor."""

    convolutions: tuple[Path, ...]
    """A library for each convolution."""


class PznetNet:
    """A net, the only one of its process."""

    def __init__(self, folder: Path, net: Any, cores: set[int], threads: set[int]) -> None:
        self.folder = folder
        self.input_shape = tuple(int(n) for n in net.get_in_shape())
        """(n, c, z, y, x) that the net was compiled for."""
        self.output_shape = tuple(int(n) for n in net.get_out_shape())
        """(n, c, z, y, x) that it returns."""
        self._net = net
        self._cores = cores
        self._threads = threads
        self._callers: set[int] = set()

    @property
    def num_threads(self) -> int:
        """Threads that the net started, and the one that calls it."""
        return 1 + len(_threads() & self._threads)

    def forward(self, batch_nczyx: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the net on an array of exactly its input's shape."""
        assert batch_nczyx.shape == self.input_shape, "the net would end the process"
        batch_nczyx = np.ascontiguousarray(batch_nczyx, np.float32)
        caller = threading.get_native_id()
        if caller in self._callers:
            return self._checked(self._net.forward(batch_nczyx))
        # The first call of a thread may start workers and bind this one.
        self._callers.add(caller)
        with unbound(self._cores) as started:
            output = self._net.forward(batch_nczyx)
        self._threads |= started
        return self._checked(output)

    def _checked(self, output: Any) -> npt.NDArray[np.float32]:
        """Return the output in its shape."""
        array = np.asarray(output, np.float32)
        if array.size != np.prod(self.output_shape):
            raise ModelError(
                f"the net in {self.folder} returned {count(array.size, 'value')}; expected "
                f"{self.output_shape}",
                key="model.path",
            )
        return array.reshape(self.output_shape)


def find_files(folder: Path) -> PznetFiles:
    """Return the parts of a net, all of which are there.

    Raises:
        ModelError: one is missing or empty: the engine would end the process.
    """
    library = folder / "znet.so"
    if not library.is_file():
        what = "has no znet.so" if folder.is_dir() else "is not a folder"
        raise ModelError(
            f"{folder} {what}; expected the folder of a compiled pznet: znet.so, weights/*.data, "
            "lib/conv_*.so",
            key="model.path",
        )
    weights = tuple(sorted((folder / "weights").glob("*.data")))
    convolutions = tuple(sorted((folder / "lib").glob("*.so")))
    for files, pattern in ((weights, "weights/*.data"), (convolutions, "lib/*.so")):
        if not files:
            raise ModelError(f"{folder} has no {pattern}: the net is incomplete", key="model.path")
        empty = [file for file in files if file.stat().st_size == 0]
        if empty:
            raise ModelError(f"{empty[0]} is empty: the net is incomplete", key="model.path")
    return PznetFiles(library=library, weights=weights, convolutions=convolutions)


def load_net(folder: Path) -> PznetNet:
    """Return the net of a folder, loaded by the first call.

    Raises:
        ModelError: it is not whole, is for another Python, or another net was loaded before.
    """
    with _lock:
        folder = folder.resolve()
        if not _loaded:
            _loaded.append(_load(folder))
        if _loaded[0].folder != folder:
            raise ModelError(
                f"this process has loaded the net {_loaded[0].folder}, and pznet allows one for "
                f"each process: start another for {folder}",
                key="model.path",
            )
        return _loaded[0]


def _load(folder: Path) -> PznetNet:
    """Load a net, and leave the process as it was."""
    files = find_files(folder)
    cores = os.sched_getaffinity(0)
    with _short_path(folder) as short, _environment(), _quiet_output(), unbound(cores) as started:
        module = _import(files.library)
        net = module.znet(f"{short}/weights/", f"{short}/lib")
        loaded = PznetNet(folder, net, cores, started)
        loaded.forward(np.zeros(loaded.input_shape, np.float32))
    return loaded


def _import(library: Path) -> Any:
    """Return the extension module."""
    spec = importlib.util.spec_from_file_location("znet", library)
    assert spec is not None and spec.loader is not None, "an .so file always has a loader"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ModelError(
            f"{library} cannot be imported: {error}; {needed_python(library)}", key="model.path"
        ) from error
    sys.modules["znet"] = module
    return module


def needed_python(library: Path) -> str:
    """Return in words which Python an extension module is for, as far as its text tells."""
    here = f"this is Python {sys.version_info.major}.{sys.version_info.minor}"
    found = re.search(
        rb"libpython(?P<a>3\.\d+)|boost_python-?(?:py)?3(?P<b>\d+)|cpython-3(?P<c>\d+)",
        library.read_bytes(),
    )
    if found is None:
        return f"it is bound to the minor version of Python that it was compiled for, and {here}"
    minor = found["b"] or found["c"]
    version = found["a"].decode() if found["a"] else f"3.{minor.decode()}"
    return f"it was compiled for Python {version}, and {here}"


@contextmanager
def unbound(cores: set[int]) -> Iterator[set[int]]:
    """Give this thread, and all that appear meanwhile, the cores of the process back.

    Yields the set of ids that is filled with the threads that appeared.
    """
    before = _threads()
    started: set[int] = set()
    try:
        yield started
    finally:
        started |= _threads() - before
        for thread in (threading.get_native_id(), *started):
            try:
                os.sched_setaffinity(thread, cores)
            except ProcessLookupError:
                continue  # it has ended


def _threads() -> set[int]:
    """Return the ids of all threads of this process."""
    return {int(entry.name) for entry in _TASKS.iterdir()}


@contextmanager
def _environment() -> Iterator[None]:
    """Set what the engine reads while it loads, and set it back."""
    with tempfile.TemporaryDirectory(prefix="mpichunk-pznet-") as scratch:
        changes: dict[str, str | None] = {"PYTHONUNBUFFERED": None}
        if "ZNNPHI_PATH" not in os.environ:
            changes["ZNNPHI_PATH"] = scratch
            write_resolver(Path(scratch))
        elif not (Path(os.environ["ZNNPHI_PATH"]) / JIT).is_file():
            raise ModelError(
                f"ZNNPHI_PATH is {os.environ['ZNNPHI_PATH']}, which has no {JIT}; correct it, or "
                "unset it: a compiled net does not need it",
                key="model.path",
            )
        before = {name: os.environ.get(name) for name in changes}
        _set_environment(changes)
        try:
            yield
        finally:
            _set_environment(before)


def write_resolver(folder: Path) -> Path:
    """Write the program that names the library of a convolution, and compiles nothing."""
    path = folder / JIT
    path.parent.mkdir(parents=True)
    path.write_text(_RESOLVER.format(python=f"'{sys.executable}'"))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _short_path(folder: Path) -> Iterator[Path]:
    """Give a folder a path without spaces: the engine puts it into a shell command."""
    with tempfile.TemporaryDirectory(prefix="mpichunk-pznet-") as scratch:
        link = Path(scratch) / "net"
        link.symlink_to(folder)
        yield link


@contextmanager
def _quiet_output() -> Iterator[None]:
    """Send to standard error what C code prints on standard output."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def main(arguments: Sequence[str]) -> None:
    """Try a net: write its shapes into a file, or why it does not load."""
    folder, report = map(Path, arguments)
    try:
        net = load_net(folder)
        found: dict[str, Any] = {"input": net.input_shape, "output": net.output_shape}
    except ModelError as error:
        found = {"error": str(error)}
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
