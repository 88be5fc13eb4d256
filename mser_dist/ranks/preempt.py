"""A signal becomes a flag, the ranks agree on it between two steps, and all of them save the same step.

A handler must not save by itself: a ZeRO save is a collective, and only one rank may have been signalled. USR1 and USR2
are what SLURM and submitit send before they take a job's nodes, TERM comes at the end of the grace time, INT is Ctrl-C.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
SAVED = 75  # exit code of a run that has saved and can go on: EX_TEMPFAIL of sysexits.h, "try again later"


class Flag:
    """The first signal that this process has received, or 0."""

    def __init__(self) -> None:
        self.number = 0

    def up(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        global heard
        heard = True
        if self.number == 0:
            self.number = number
            # Not print: the handler may have interrupted one, and a buffered stream raises when it is entered twice.
            try:
                os.write(2, f"mser: {signal.Signals(number).name}: stopping after this step\n".encode())
            except OSError:  # Ctrl-C has ended `| tee log` too: what is said on the way to the save must not end it
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
        elif number == self.number == signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C twice: someone at the keyboard does not want to wait for a save


_listening: Flag | None = None
heard = False  # whether a signal has come while this process listened


@contextmanager
def listen() -> Iterator[Flag]:
    """Within the block, `SIGNALS` only raise the flag; behind it, the handlers of before are back.

    A block within another shares its flag. Outside the main thread, where Python cannot handle signals, the flag is
    never raised.
    """
    global _listening
    if _listening is not None:
        yield _listening
        return
    flag = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.up) for number in SIGNALS}
    _listening = flag
    try:
        yield flag
    finally:
        _listening = None
        for number, handler in before.items():
            signal.signal(number, handler)
