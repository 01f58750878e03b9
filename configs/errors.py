"""The one exception for what a person can cause."""


class UserError(Exception):
    """One or two lines: what is wrong, where, what to do. Ends the program with exit code 2, without a traceback."""
