"""Small ONNX files for tests, written without any package of ONNX: protobuf's wire format by hand.

Numbers are those of the fields in onnx.proto.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Shape = Sequence[int | str]
"""Sizes; a name stands for any size."""

FLOAT = 1
INTS, INT = 7, 2


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | str | bytes) -> bytes:
    """Return one field: a number, or what has a length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def value_info(name: str, shape: Shape) -> bytes:
    sizes = [field(1, size) if isinstance(size, int) else field(2, size) for size in shape]
    dims = b"".join(field(1, size) for size in sizes)
    tensor = field(1, FLOAT) + field(2, dims)
    return field(1, name) + field(2, field(1, tensor))


def tensor(name: str, values: np.ndarray, external: str | None = None) -> bytes:
    """Return a constant; with `external`, its bytes are in that file."""
    data = b"".join(field(1, size) for size in values.shape) + field(2, FLOAT) + field(8, name)
    if external is None:
        return data + field(9, values.astype("<f4").tobytes())
    entry = field(1, "location") + field(2, external)
    return data + field(13, entry) + field(14, 1)


def attribute(name: str, value: int | Sequence[int]) -> bytes:
    if isinstance(value, int):
        return field(1, name) + field(3, value) + field(20, INT)
    return field(1, name) + b"".join(field(8, n) for n in value) + field(20, INTS)


def node(kind: str, inputs: Sequence[str], output: str, **attributes: int | Sequence[int]) -> bytes:
    data = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)
    return data + b"".join(field(5, attribute(k, v)) for k, v in attributes.items())


def model(
    nodes: Sequence[bytes],
    constants: Sequence[bytes],
    *,
    inputs: Shape = ("n", 1, "z", "y", "x"),
    outputs: Sequence[str] = ("out",),
    out_channels: int = 2,
) -> bytes:
    """Return an ONNX file whose input is called `in`."""
    result = ["n", out_channels, "a", "b", "c"]
    graph = b"".join(field(1, item) for item in nodes) + field(2, "graph")
    graph += b"".join(field(5, item) for item in constants) + field(11, value_info("in", inputs))
    graph += b"".join(field(12, value_info(name, result)) for name in outputs)
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 17))


SCALES = np.array([2, -3], np.float32)


def convolution(path: Path, *, inputs: Shape = ("n", 1, "z", "y", "x"), cut: bool = False) -> Path:
    """Write a network of two channels: 2 and -3 times its input, which `cut` takes a border off."""
    size = 3 if cut else 1
    kernel = np.zeros((2, 1, size, size, size), np.float32)
    kernel[:, 0, size // 2, size // 2, size // 2] = SCALES
    nodes = [node("Conv", ("in", "w"), "out", kernel_shape=kernel.shape[2:])]
    path.write_bytes(model(nodes, [tensor("w", kernel)], inputs=inputs))
    return path


def pooling(path: Path) -> Path:
    """Write a network that needs multiples of (1, 4, 4): its input plus the means of 4 x 4."""
    how = {"kernel_shape": (1, 4, 4), "strides": (1, 4, 4)}
    nodes = [
        node("AveragePool", ("in",), "small", **how),
        node("ConvTranspose", ("small", "w"), "large", **how),
        node("Add", ("in", "large"), "out"),
    ]
    ones = tensor("w", np.ones((1, 1, 1, 4, 4), np.float32))
    path.write_bytes(model(nodes, [ones], out_channels=1))
    return path


def external(path: Path, *, location: str = "net.onnx.data") -> Path:
    """Write a network as `convolution`, its weights in a file beside it."""
    kernel = SCALES.reshape(2, 1, 1, 1, 1)
    nodes = [node("Conv", ("in", "w"), "out", kernel_shape=(1, 1, 1))]
    path.write_bytes(model(nodes, [tensor("w", kernel, location)]))
    (path.parent / "net.onnx.data").write_bytes(struct.pack("<2f", *SCALES))
    return path


def two_outputs(path: Path) -> Path:
    """Write a network that returns its input twice."""
    nodes = [node("Relu", ("in",), "out"), node("Sigmoid", ("in",), "other")]
    path.write_bytes(model(nodes, [], outputs=("out", "other"), out_channels=1))
    return path


def not_a_number(path: Path) -> Path:
    """Write a network whose weights are damaged."""
    constant = tensor("w", np.full((1, 2, 1, 1, 1), np.nan, np.float32))
    path.write_bytes(model([node("Mul", ("in", "w"), "out")], [constant]))
    return path
