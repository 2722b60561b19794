"""The one exception for what a user can cause."""


class UsageError(ValueError):
    """A mistake in what was asked for: one line with what was wrong, the value met, what is allowed, what to do next.

    The command line prints the line and exits with status 2.
    """

    def __str__(self) -> str:
        # A DataLoader worker re-raises with its traceback in front of the message; the message is the last line.
        return super().__str__().strip().rpartition("\n")[2].removeprefix("dgnet.errors.UsageError: ")
