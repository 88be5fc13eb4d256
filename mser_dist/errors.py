"""What ends a command without a traceback: mistakes that a user can mend, and an orderly stop."""


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, where, and how to mend it.

    The command line prints it as ``mser: error: …`` and exits with `code` (``--debug`` shows the traceback).
    """

    code = 2


class PassingError(UserError):
    """An error of the machine that may pass, such as a peer that did not come: a job may be started again."""

    code = 1


class Stopped(Exception):
    """A job was asked to stop. A training has saved `step` on every rank; what has no steps begins anew.

    where: what is said of it instead.
    """

    def __init__(self, reason: str, step: int | None, where: str = "") -> None:
        self.reason, self.step = reason, step
        if step is not None:
            where = f"at step {step}; the same command continues from there"
        super().__init__(f"{reason}: stopped {where or 'before the end; the same command begins anew'}")
