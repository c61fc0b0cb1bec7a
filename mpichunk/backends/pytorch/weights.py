"""From a file of weights into a network: all of them and nothing else, or one message why not.

Unpickles no code unless told to. Knows neither where the network comes from nor what it computes.
"""

import logging
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpichunk.errors import ModelError
from mpichunk.words import agree, count

State = Mapping[str, Any]
"""Dotted name of a parameter or buffer to its tensor."""

_STATE_KEYS = "state_dict", "model_state_dict", "model", "ema"
_WRAPPER_PREFIXES = "module.", "_orig_mod."
_COUNTERS = ("n_averaged",)
"""What torch's AveragedModel keeps beside the weights that it averages."""

log = logging.getLogger(__name__)


def load_weights(
    network: nn.Module, path: Path, *, key: str | None = None, trust_pickle: bool = False
) -> None:
    """Copy the weights of a file into a network.

    Args:
        network: any module.
        path: safetensors file or checkpoint.
        key: where in the checkpoint they are; None: the first of the usual names.
        trust_pickle: let the checkpoint run the code that it may hold.

    Raises:
        ModelError: the file is damaged, holds code, or does not fit; key `model.weights`.
    """
    expected = network.state_dict()
    state = _strip_prefixes(_read_state(path, key, trust_pickle), expected)
    _refuse_mismatch(state, expected, path)
    network.load_state_dict(state, strict=False)


def _read_state(path: Path, key: str | None, trust_pickle: bool) -> State:
    """Return the tensors of a safetensors file or a checkpoint."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            # torch wonders about pickles that it did not write; what counts is whether it can.
            warnings.simplefilter("ignore", UserWarning)
            checkpoint = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        raise ModelError(_refused_pickle(path, str(error)), key="model.weights") from error
    except Exception as error:
        # torch, safetensors and zip have no common class for a file that is damaged.
        script = " (TorchScript belongs in model.path)" if "TorchScript" in str(error) else ""
        raise ModelError(
            f"{path} holds no readable weights: {first_line(error)}{script}; expected a "
            "safetensors file or a checkpoint of tensors",
            key="model.weights",
        ) from error
    return _unwrap(checkpoint, path, key)


def _refused_pickle(path: Path, reason: str) -> str:
    """Return why a pickle was refused: it would run code, or is none."""
    _, marker, rest = reason.partition("GLOBAL ")
    if not marker:
        return f"{path} is not a checkpoint; expected a safetensors file or a checkpoint of tensors"
    return (
        f"{path} holds more than tensors: loading it would run {rest.split()[0]}, and weights from "
        "others must not run code; save it as torch.save(network.state_dict(), ...) or "
        "safetensors, or, if you trust it, set model.trust_pickle: true"
    )


def _unwrap(checkpoint: Any, path: Path, key: str | None) -> State:
    """Return the state inside a checkpoint that may hold an optimizer and more."""
    state = _state_of(checkpoint)
    while isinstance(state, Mapping):
        inner = [k for k in ([key] if key else _STATE_KEYS) if _is_state(state.get(k))]
        if not inner:
            break
        if len(inner) > 1:
            log.warning(
                "%s holds weights as %s: took %r; model.options: {weights_key: %s} selects another",
                path,
                ", ".join(map(repr, inner)),
                inner[0],
                inner[1],
            )
        state, key = _state_of(state[inner[0]]), None
    if (
        key is None
        and isinstance(state, Mapping)
        and any(isinstance(value, Tensor) for value in state.values())
    ):
        return state
    found = f"a {type(state).__name__}"
    if isinstance(state, Mapping):
        found = f"keys {', '.join(map(str, list(state)[:8]))}"
    below = f"below {key!r}" if key else f"directly or below {', '.join(_STATE_KEYS)}"
    raise ModelError(
        f"{path} holds {found}; expected names with tensors, {below}", key="model.weights"
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping | nn.Module)


def _state_of(value: Any) -> Any:
    """Return the weights of a whole network, which only a trusted file can hold."""
    return value.state_dict() if isinstance(value, nn.Module) else value


def _strip_prefixes(state: State, expected: State) -> dict[str, Any]:
    """Return the state without what DataParallel and torch.compile put before its names."""
    stripped = {key: value for key, value in state.items() if key not in _COUNTERS}
    found = True
    while found:
        found = False
        for prefix in _WRAPPER_PREFIXES:
            everywhere = all(str(key).startswith(prefix) for key in stripped)
            if everywhere and not all(key.startswith(prefix) for key in expected):
                stripped = {key[len(prefix) :]: value for key, value in stripped.items()}
                found = True
    return stripped


def _refuse_mismatch(state: State, expected: State, path: Path) -> None:
    """Compare names and shapes; name the first that differs."""
    # Batch norm's counter is not used in eval mode, and old checkpoints lack it.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    shapes = [
        (key, tuple(value.shape), tuple(expected[key].shape))
        for key, value in state.items()
        if isinstance(value, Tensor) and key in expected and value.shape != expected[key].shape
    ]
    problems = []
    if missing:
        problems.append(
            f"{count(len(missing), 'name')} of the network {agree(len(missing), 'is', 'are')} "
            f"missing, first {missing[0]!r}"
        )
    if unexpected:
        problems.append(
            f"{len(unexpected)} {agree(len(unexpected), 'is', 'are')} unknown to it, first "
            f"{unexpected[0]!r}"
        )
    if shapes:
        key, found, wanted = shapes[0]
        problems.append(
            f"{len(shapes)} {agree(len(shapes), 'has', 'have')} another shape, first {key!r}: "
            f"{found}, expected {wanted}"
        )
    if problems:
        raise ModelError(
            f"{path} does not fit the network: {'; '.join(problems)}; check model.path and "
            "model.arguments",
            key="model.weights",
        )


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, without its own full stop."""
    text = str(error).strip()
    return text.splitlines()[0].strip().rstrip(".") if text else "no message"
