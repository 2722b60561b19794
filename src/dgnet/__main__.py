"""`python -m dgnet`."""

import sys

from dgnet.cli import main

sys.exit(main())
