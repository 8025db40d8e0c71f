"""`python -m hieratok`, which is also what `torchrun -m hieratok` starts."""

import sys

from hieratok.cli import main

sys.exit(main())
