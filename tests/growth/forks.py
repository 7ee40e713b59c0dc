"""Processes that start with everything imported, for tests of what signals and limits leave behind."""

import os
import sys


def fork() -> int:
    """os.fork(). The child is not traced: a signal's handler that comes while coverage holds its lock waits for ever."""
    pid = os.fork()
    if not pid:
        sys.settrace(None)
    return pid
