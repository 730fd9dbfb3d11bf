"""The one exception for input that a user can correct."""


class InputError(ValueError):
    """Bad input; its message is one line that says what is wrong, the value, and what to change."""
