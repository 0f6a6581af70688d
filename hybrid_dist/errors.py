"""The one exception that means «yours to fix»: `train.py` and `hybrid-dist` print its message and exit with 2."""


class UserError(ValueError):
    """A mistake in a config, a file or a command. The message says what is wrong, where, and what would do."""

    def __init__(self, message: str, shared: bool = False):
        """`shared`: every rank raises the same, so that rank 0 alone has to print it."""
        super().__init__(message)
        self.shared = shared
