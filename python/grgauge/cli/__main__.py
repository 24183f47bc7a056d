"""python -m grgauge.cli, where the script `grgauge` is not on the path."""

import sys

from . import main

sys.exit(main())
