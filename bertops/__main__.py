"""``python -m bertops``."""

import sys

from bertops.cli import main

sys.exit(main())
