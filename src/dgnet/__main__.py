"""`python -m dgnet`, and the installed command."""

from typing import NoReturn

from dgnet._guard import run_process


def _run() -> int:
    from dgnet.cli import main  # inside the guard: the import takes a moment

    return main()


def entry_point() -> NoReturn:
    """Run the command that the process was started with."""
    run_process(_run)


if __name__ == "__main__":
    entry_point()
