"""``python -m oprd``, and so ``accelerate launch -m oprd``."""

import sys

from oprd.cli import main

sys.exit(main())
