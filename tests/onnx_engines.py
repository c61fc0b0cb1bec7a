"""Engines for the networks of `onnx_maker`: what is asked of them, and a batch for them."""

from functools import partial

import numpy as np

from tests import engines
from tests.optional import need

SHAPE = {"patch_shape": (4, 8, 12)}
make_request = partial(engines.make_request, **SHAPE)


def load(backend, path, *, changes=None, **keys):
    """Load a network, or skip where the package of the backend is not installed."""
    need(backend)
    return engines.load_engine(backend, path, changes=SHAPE | (changes or {}), **keys)


BATCH = np.random.default_rng(3).random((2, 1, 4, 8, 12), dtype=np.float32)
