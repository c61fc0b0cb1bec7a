"""`python -m tests.benchmarks.image PATH Z Y X`: write a uint8 volume to a local zarr 3, quickly.

A piece of made-up electron microscopy again and again: it compresses as the real thing does. Holds
no more than a layer of chunks.
"""

import sys
from pathlib import Path

import numpy as np
import tensorstore as ts

from mpichunk.geometry.box import Box
from mpichunk.volume.synthetic import Membranes

PIECE = 64, 256, 256
CHUNK = 64


def write(path, shape):
    """Write the volume."""
    metadata = {
        "shape": list(shape),
        "data_type": "uint8",
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [min(CHUNK, n) for n in shape]},
        },
        "codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3}}],
    }
    kvstore = {"driver": "file", "path": f"{Path(path).resolve()}/"}
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    volume = ts.open(spec, create=True).result()
    piece = Membranes(shape=PIECE, seed=7).image(Box.from_shape((0, 0, 0), PIECE))
    repeats = [-(-n // p) for n, p in zip(shape[1:], PIECE[1:], strict=True)]
    layer = np.tile(piece.reshape(PIECE), (1, *repeats))[:, : shape[1], : shape[2]]
    for start in range(0, shape[0], PIECE[0]):
        depth = min(PIECE[0], shape[0] - start)
        volume[start : start + depth].write(layer[:depth]).result()


if __name__ == "__main__":
    write(sys.argv[1], [int(n) for n in sys.argv[2:5]])
