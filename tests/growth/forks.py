"""Processes that start with everything imported, for tests of signals and limits, and of several ranks."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def fork() -> int:
    """os.fork(), whose child is not traced: a signal that comes while coverage holds its lock would wait for ever."""
    pid = os.fork()
    if not pid:
        sys.settrace(None)
    return pid


def in_processes(work: Callable[..., None], world: int, folder: Path, *arguments) -> None:
    """work(rank, *arguments) in `world` forks of this process, a gloo group; fails where one of them does."""
    context = torch.multiprocessing.get_context("fork")
    store = f"file://{tempfile.mktemp(dir=folder)}"
    ranks = [context.Process(target=_rank, args=(work, rank, world, store, arguments)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0


def _rank(work, rank, world, store, arguments):
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    work(rank, *arguments)
    torch.distributed.destroy_process_group()
