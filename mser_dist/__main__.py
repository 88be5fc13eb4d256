"""``python -m mser_dist`` is ``mser``."""

import sys

from mser_dist.cli import main

sys.exit(main())
