"""Processes that start with everything imported, for tests of what signals and limits leave behind."""

import os
import sys


def fork() -> int:
    """os.fork(), whose child is not traced: a signal that comes while coverage holds its lock would wait for ever."""
    pid = os.fork()
    if not pid:
        sys.settrace(None)
    return pid
