"""A network of a torch.export file (.pt2): loaded without running anything but the network.

Knows which shapes the file was exported for, and says so where they are not the run's. Knows no
weights of other files.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpichunk.backends.engine import EngineRequest
from mpichunk.backends.pytorch.exported_archive import plain_copy, schema_version, strange_parts
from mpichunk.backends.pytorch.weights import first_line
from mpichunk.backends.shapes.fixed_shape import refuse_fixed_shape
from mpichunk.errors import ModelError

_TRAINING_ARGUMENT = {
    "aten.batch_norm.default": 5,
    "aten._native_batch_norm_legit.default": 5,
    "aten._native_batch_norm_legit_functional.default": 5,
    "aten.dropout.default": 2,
    "aten.native_dropout.default": 2,
}
"""Which argument of an operation says that the network is being trained."""


class ExportedNetwork(nn.Module):
    """Runs an exported program, which knows no `eval`: it was exported in one mode."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.exported_program = program
        self.program = program.module()

    def train(self, mode: bool = True) -> Self:
        """Leave the program as it was exported."""
        self.training = mode
        return self

    def forward(self, batch_nczyx: Tensor) -> Any:
        """Run the program."""
        return self.program(batch_nczyx)


def load_exported(path: Path, request: EngineRequest, *, trust_pickle: bool) -> ExportedNetwork:
    """Return the network of a .pt2 file on the device of a request.

    Raises:
        ModelError: the file is damaged, of a newer torch, holds code, or is for other shapes.
    """
    program = load_program(path, request, trust_pickle=trust_pickle)
    if request.device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, request.device)
    return ExportedNetwork(program)


def load_program(path: Path, request: EngineRequest, *, trust_pickle: bool) -> Any:
    """Return the `ExportedProgram` of a file, on the CPU; raises as `load_exported`."""
    try:
        strange = [] if trust_pickle else strange_parts(path)
        source = path if trust_pickle or strange else plain_copy(path)
    except ValueError as error:
        raise ModelError(
            f"{path} cannot be read: {error}; it is damaged or cut short", key="model.path"
        ) from error
    if strange:
        raise ModelError(
            f"{path} asks for more than tensor operations: {strange[0][:80]!r}; a file from others "
            "must not run code. If you trust it, set model.trust_pickle: true",
            key="model.path",
        )
    try:
        with _reasons() as reasons, _pickles_of_tensors_only(not trust_pickle):
            program = torch.export.load(source)
    except Exception as error:
        # The loader raises whatever it stumbles over.
        text = _refused(path, reasons or [error])
        raise ModelError(text, key="model.path") from error
    _refuse_training(path, program)
    inputs = program.graph_signature.user_inputs
    if len(inputs) != 1:
        raise ModelError(
            f"{path} takes {len(inputs)} inputs; expected one, the batch: export a module that "
            "takes the image only",
            key="model.path",
        )
    shape = next(n.meta["val"].shape for n in program.graph.nodes if n.name == inputs[0])
    refuse_fixed_shape(path, [n if isinstance(n, int) else None for n in shape], request)
    return program


def _refused(path: Path, errors: Sequence[BaseException]) -> str:
    """Return why a file was not loaded."""
    text = first_line(errors[0])
    if any("weights_only" in str(error) for error in errors):
        return (
            f"{path} holds pickles of more than tensors, and a file from others must not run code; "
            "if you trust it, set model.trust_pickle: true"
        )
    if "schema version" in text or "PT2 archive version" in text:
        version, writer = schema_version(path)
        return (
            f"{path} was exported by another torch ({writer}, schema {version}), and torch "
            f"{torch.__version__} cannot read it ({text}); install that torch, or export the "
            "network again with this one"
        )
    return f"{path} cannot be loaded by torch.export of torch {torch.__version__}: {text}"


def _refuse_training(path: Path, program: Any) -> None:
    """Refuse a network exported while it was trained: its result would depend on the batch."""
    for node in program.graph.nodes:
        place = _TRAINING_ARGUMENT.get(str(node.target))
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise ModelError(
                f"{path} was exported in training mode ({node.target}); call eval() on the network "
                "and export it again",
                key="model.path",
            )


@contextmanager
def _reasons() -> Iterator[list[BaseException]]:
    """Yield a list that gets the errors that torch's loader only logs; its warnings are dropped."""
    found: list[BaseException] = []
    logger = logging.getLogger("torch.export")

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            found.append(error)
        return False

    logger.addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield found
    finally:
        logger.removeFilter(keep)


@contextmanager
def _pickles_of_tensors_only(is_wanted: bool) -> Iterator[None]:
    """Have torch refuse pickles that run code, also where its loader would fall back on them."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    if is_wanted:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif is_wanted:
            del os.environ[name]
