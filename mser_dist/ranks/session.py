"""A training inside somebody else's process: it comes, works, and leaves the process as it was."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mser_dist import quiet
from mser_dist.ranks import distributed
from mser_dist.ranks.preempt import SIGNALS


@contextmanager
def session() -> Iterator[None]:
    """Around what starts a process group: behind the block there is none, unless there was one before.

    The environment, the signal handlers and what names an uncaught error are those of before too, whatever ended it.
    """
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    excepthook = sys.excepthook  # torch puts one in its place that names the rank, at every start of a group
    had_group = _has_group()
    quiet.set_environment()
    try:
        yield
    finally:
        if _has_group() and not had_group:
            distributed.shutdown()
        distributed.leave_store()
        sys.excepthook = excepthook
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None: not set from Python, so nobody here has changed it
                    signal.signal(number, handler)


def _has_group() -> bool:
    """Whether this process is in a process group; without importing torch to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
