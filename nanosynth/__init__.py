"""What the scripts stand on. Each module owns one thing; its first lines say which."""


class UserError(ValueError):
    """A mistake that the user can mend: scripts print its text as one line and exit with 1.

    The text says what was found, what was wanted, and the flag or command that mends it.
    """
