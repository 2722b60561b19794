"""`python -m dgnet`, and the installed command."""

import os
from typing import NoReturn

from dgnet._guard import run_process


def _run() -> int:
    os.environ["MPLBACKEND"] = "agg"  # commands draw into files; another backend may be missing, or misspelt
    from dgnet.cli import main  # inside the guard: the import takes a moment

    return main()


def entry_point() -> NoReturn:
    """Run the command that the process was started with."""
    run_process(_run)


if __name__ == "__main__":
    entry_point()
