"""The one exception that means «yours to fix»: `train.py` and `hybrid-dist` print its message and exit with 2."""


def spelt_out(text: str) -> str:
    """Text with what a terminal would obey written out: names in it come from files of others. Line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


class UserError(ValueError):
    """A mistake in a config, a file or a command. The message says what is wrong, where, and what would do."""

    def __init__(self, message: str, shared: bool = False):
        """`shared`: every rank raises the same, so that rank 0 alone has to print it."""
        super().__init__(spelt_out(message))
        self.shared = shared
