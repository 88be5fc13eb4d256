"""``python -m mser_dist`` is ``mser``."""

import sys

from mser_dist.cli.main import main

sys.exit(main())
