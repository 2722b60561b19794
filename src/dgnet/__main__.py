"""`python -m dgnet`."""

from dgnet.cli import entry_point

entry_point()
