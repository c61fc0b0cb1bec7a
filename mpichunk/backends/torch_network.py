"""From a config's `model` to a torch module with its weights, or one message about why not.

Executes the user's Python file when there is one, and never unpickles code. Knows no patches and
does not run the network.
"""

import importlib
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mpichunk.backends.model_source import ModelSource, find_source, weights_file
from mpichunk.backends.torch_weights import first_line, load_weights
from mpichunk.config import Model
from mpichunk.errors import ModelError


def load_network(model: Model, device: str) -> nn.Module:
    """Return the network in float32 on a device, in `eval` mode.

    Raises:
        ModelError: with the key of the config that must change.
    """
    source, weights = find_source(model), weights_file(model)
    if source.kind == "script":
        network = _load_script(source.path, model)
    else:
        network = _make_network(source, model.arguments)
        if weights is None:
            _refuse_random(network, _make_network(source, model.arguments, seed=1))
    if weights is not None:
        load_weights(network, weights)
    return network.eval().float().to(device)


def where_raised(error: BaseException) -> str:
    """Return `file:line` of the innermost frame outside torch and mpichunk's backends, or ""."""
    own = str(Path(__file__).parent), str(Path(torch.__file__).parent), "<frozen"
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _load_script(path: Path, model: Model) -> nn.Module:
    """Return a TorchScript network with the weights that its file holds."""
    if model.arguments:
        raise ModelError(
            f"{path} is a TorchScript file, which takes no arguments; remove model.arguments",
            key="model.arguments",
        )
    try:
        with warnings.catch_warnings():
            # torch would rather see torch.export; TorchScript is what labs have.
            warnings.simplefilter("ignore", DeprecationWarning)
            network: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(
            f"{path} cannot be loaded as TorchScript by torch {torch.__version__}: "
            f"{first_line(error)}; it may be damaged, or written by a newer torch",
            key="model.path",
        ) from error
    return network


def _refuse_random(network: nn.Module, again: nn.Module) -> None:
    """Refuse a network whose values depend on chance: its weights were forgotten.

    Code that loads weights of its own makes the same network whatever the seed; and what differs
    from rank to rank would give every rank's blocks values of their own.
    """
    other = again.state_dict()
    for name, value in network.state_dict().items():
        if not torch.equal(value, other[name]):
            raise ModelError(
                f"the network's values, first {name!r}, are random, as before training, and "
                "model.weights is not set; give the file of its trained weights",
                key="model.weights",
            )


def _make_network(source: ModelSource, arguments: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Return what `Name` makes of the arguments, its weights not yet set."""
    torch.manual_seed(seed)
    module = _run_user_code(
        lambda: _import(source), f"{source.path} cannot be imported", "model.path"
    )
    maker = getattr(module, source.name, None)
    if not callable(maker):
        raise ModelError(
            f"{source.path} has no network {source.name!r}; it has {_candidates(module)}",
            key="model.path",
        )
    what = f"{source.name} of {source.path}"
    network = maker
    if not isinstance(maker, nn.Module):
        network = _run_user_code(
            lambda: maker(**arguments),
            f"{what} cannot be made with the arguments {dict(arguments)}",
            "model.arguments",
        )
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"{what} makes a {type(network).__name__}; expected a torch.nn.Module",
            key="model.path",
        )
    return network


def _run_user_code(call: Callable[[], Any], what: str, key: str) -> Any:
    """Return what the user's code returns; turn whatever it raises into one message."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        else:
            where = where_raised(error)
        at = f" at {where}" if where else ""
        raise ModelError(
            f"{what}: {type(error).__name__}{at}: {first_line(error)}", key=key
        ) from error


def _import(source: ModelSource) -> ModuleType:
    """Import a module, or execute a Python file as one, leaving no byte code beside it.

    The file's directory joins the end of Python's path, so that it can import its neighbours.
    """
    if source.kind == "module":
        return importlib.import_module(source.module)
    path = source.path
    name = f"mpichunk_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a .py file always has a spec"
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _candidates(module: ModuleType) -> str:
    """Return the names in a module that could make a network."""
    networks = [
        name
        for name, value in vars(module).items()
        if (isinstance(value, type) and issubclass(value, nn.Module))
        or (callable(value) and getattr(value, "__module__", None) == module.__name__)
    ]
    return ", ".join(sorted(networks)) or "no class or function at all"
