"""`python -m mpichunk`."""

from mpichunk.cli import entry

entry()
