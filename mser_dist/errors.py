"""The errors that are shown to a user without a traceback."""


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, where, and how to mend it.

    The command line prints it as ``mser: error: …`` and exits with `code` (``--debug`` shows the traceback).
    """

    code = 2


class PassingError(UserError):
    """An error of the machine that may pass, such as a peer that did not come: a job may be started again."""

    code = 1
