"""From a config's `model` to a torch module with its weights, or one message about why not.

Executes the user's Python file when there is one, and unpickles code only when told to. Knows no
patches and does not run the network.
"""

import importlib
import importlib.util
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mpichunk.backends.engine import EngineRequest
from mpichunk.backends.files.source import (
    WEIGHTS_KEY,
    ModelSource,
    find_source,
    weights_file,
)
from mpichunk.backends.pytorch.chunkflow import MAKERS, ChunkflowNetwork, make_universal
from mpichunk.backends.pytorch.exported import load_exported
from mpichunk.backends.pytorch.weights import first_line, load_weights
from mpichunk.config.schema import Model
from mpichunk.errors import ModelError
from mpichunk.filehash import file_hash

log = logging.getLogger(__name__)


def load_network(model: Model, request: EngineRequest) -> nn.Module:
    """Return the network in float32 on the device of a request, in `eval` mode.

    Raises:
        ModelError: with the key of the config that must change.
    """
    source, weights = find_source(model), weights_file(model)
    weights_key = _weights_key(model)
    if source.kind == "exported":
        _refuse_arguments(source.path, model)
        exported = load_exported(source.path, request, trust_pickle=model.trust_pickle)
        if weights is not None:
            load_weights(
                exported.program, weights, key=weights_key, trust_pickle=model.trust_pickle
            )
        return exported.eval()
    if source.kind == "script":
        network = _load_script(source.path, model)
    else:
        _log_executed_code(source)
        if source.name in MAKERS:
            return _load_chunkflow(source, model, request).eval().to(request.device)
        network = _make_network(source, model.arguments)
        if weights is None:
            _refuse_random(network, _make_network(source, model.arguments, seed=1))
    if weights is not None:
        load_weights(network, weights, key=weights_key, trust_pickle=model.trust_pickle)
    return network.eval().float().to(request.device)


def _weights_key(model: Model) -> str | None:
    """Return where in a checkpoint the weights are, if the config says so.

    Raises:
        ModelError: there are options that this backend does not have.
    """
    others = model.options.keys() - {WEIGHTS_KEY}
    if others and model.backend == "pytorch":
        raise ModelError(
            f"the pytorch backend has no option {min(others)!r}; it has `{WEIGHTS_KEY}`, the name "
            "of the weights in a checkpoint that holds several",
            key="model.options",
        )
    key = model.options.get(WEIGHTS_KEY)
    return None if key is None else str(key)


def _log_executed_code(source: ModelSource) -> None:
    """Put into the log which code is run, and its hash."""
    log.info("executing %s, SHA-256 %s", source.path, file_hash(source.path))


def _load_chunkflow(source: ModelSource, model: Model, request: EngineRequest) -> nn.Module:
    """Return the network of one of chunkflow's model files."""
    weights = weights_file(model)
    path = None if weights is None else str(weights)
    module = _imported(source)
    maker = _named(source, module)
    what = f"{source.name} of {source.path}"
    if source.name == "PatchInferencer":
        universal: nn.Module = _run_user_code(
            lambda: make_universal(maker, path, request), f"{what} cannot be made", "model.path"
        )
        return universal
    if source.name == "load_model":
        network = _run_user_code(
            lambda: maker(path, **model.arguments), f"{what} cannot load {path}", "model.weights"
        )
    else:
        network = _only_network(maker, what)
        if weights is None:
            again = _only_network(_named(source, _imported(source, seed=1)), what)
            _refuse_random(network, again)
        else:
            key = _weights_key(model)
            load_weights(network, weights, key=key, trust_pickle=model.trust_pickle)
    if isinstance(network, nn.Module):
        network = network.eval().float()
    return ChunkflowNetwork(network, module, model.out_channels)


def where_raised(error: BaseException) -> str:
    """Return `file:line` of the innermost frame outside torch and mpichunk's backends, or ""."""
    own = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<frozen"
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _load_script(path: Path, model: Model) -> nn.Module:
    """Return a TorchScript network with the weights that its file holds."""
    _refuse_arguments(path, model)
    log.info(
        "%s is TorchScript, which torch calls deprecated; torch.export.save writes its successor, "
        ".pt2",
        path,
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


def _refuse_arguments(path: Path, model: Model) -> None:
    """Refuse arguments for a network that is made already."""
    if model.arguments:
        raise ModelError(
            f"{path} is a saved network, which takes no arguments; remove model.arguments",
            key="model.arguments",
        )


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
                "model.weights is not set; set it to the file of trained weights",
                key="model.weights",
            )


def _make_network(source: ModelSource, arguments: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Return what `Name` makes of the arguments, its weights not yet set."""
    maker = _named(source, _imported(source, seed=seed))
    what = f"{source.name} of {source.path}"
    network = maker
    if not isinstance(maker, nn.Module):
        network = _run_user_code(
            lambda: maker(**arguments),
            f"{what} cannot be made with the arguments {dict(arguments)}",
            "model.arguments",
        )
    return _only_network(network, what)


def _imported(source: ModelSource, *, seed: int = 0) -> ModuleType:
    """Return the module that holds the network, run with torch's chance fixed."""
    torch.manual_seed(seed)
    module: ModuleType = _run_user_code(
        lambda: _import(source), f"{source.path} cannot be imported", "model.path"
    )
    return module


def _named(source: ModelSource, module: ModuleType) -> Any:
    """Return what has the name that the config gives, callable at least."""
    maker = getattr(module, source.name, None)
    if not callable(maker):
        raise ModelError(
            f"{source.path} has no network {source.name!r}; it has {_candidates(module)}",
            key="model.path",
        )
    return maker


def _only_network(network: Any, what: str) -> nn.Module:
    """Return the network, or refuse what is none."""
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"{what} returns a {type(network).__name__}; expected a torch.nn.Module",
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
    return ", ".join(sorted(networks)) or "neither a class nor a function"
