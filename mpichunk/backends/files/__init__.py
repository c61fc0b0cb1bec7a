"""The files whose bytes are a network: found by name, read as bytes, never loaded nor executed."""
