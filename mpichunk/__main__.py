"""`python -m mpichunk`."""

import sys

from mpichunk.cli import main

sys.exit(main())
