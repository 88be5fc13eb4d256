"""The one error type that is shown to a user without a traceback."""


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, where, and how to mend it.

    The command line prints it as ``mser: error: …`` and exits with code 2 (``--debug`` shows the traceback).
    """
