"""The main job on real text: train a small GPT-2, grow it, train on; and what else the same FLOPs could have bought.

Runs go side by side, each in a process of its own on one thread; this process only waits, tells and writes.
"""

import dataclasses
import hashlib
import importlib.metadata
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
from multiprocessing.connection import wait

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from growkit.demo import report
from growkit.demo.settings import Settings, read_text
from growkit.text import doubts

# run: the run it goes on from, if any, and its share of the time, in CPU seconds on one core of the README's machine.
# In the order in which they are begun: the long ones first.
PLAN = {
    "small": (None, 12),
    "scratch": (None, 38),
    "never_grown": ("small", 82),
    "middle": (None, 54),
    "grown": ("small", 30),
}
SOPHIA_PLAN = PLAN | {"sophia_scratch": (None, 42), "sophia_grown": ("small", 36)}
LINE_EVERY = 20  # seconds between two lines where there is no terminal


def run(*, data, device, seed, out, steps_scale, sophia=False, settings=None):
    """Run the demo, with `sophia` SophiaG's runs as well.

    The exit code is 0, 2 for unusable text, 130 if interrupted: `out` then holds what had finished.
    """
    settings = (settings or Settings()).scaled(steps_scale)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)  # a file has no width of its own
    try:
        name, text = read_text(data)
        if len(text) < settings.least_text():
            raise ValueError(f"{name}: {len(text)} bytes of text, expected at least {settings.least_text()}")
    except ValueError as error:
        console.print(f"--data {error}", markup=False)
        return 2
    if doubt := doubts(text):
        console.print(f"warning: --data {name} may be no text: {doubt}", markup=False, style="yellow")
    out.mkdir(parents=True, exist_ok=True)
    versions = {package: importlib.metadata.version(package) for package in ("growkit", "torch", "transformers")}
    results = {
        "command": " ".join(["growkit", *sys.argv[1:]]),
        "text": {"source": name, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
        "machine": {"python": platform.python_version(), **versions, "cores": cores()},
        "settings": {"seed": seed, "steps_scale": steps_scale, **dataclasses.asdict(settings)},
        "runs": {},
    }
    console.print(f"text: {name}, {len(text):,} bytes, sha256 {results['text']['sha256'][:16]}", markup=False)
    console.print(", ".join(f"{k} {v}" for k, v in results["machine"].items()), markup=False)
    plan = SOPHIA_PLAN if sophia else PLAN
    console.print(f"{len(plan)} runs, {min(2, cores())} at a time, one thread each; results go to {out}", markup=False)
    progress = Teller(console, plan)
    try:
        for job, result in trained(plan, settings, data, seed, device, out, progress.told):
            results["runs"][job] = result
            report.write(results, out)
            progress.finished(job, result)
    except KeyboardInterrupt:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C has nothing left to stop
        if results["runs"]:
            report.write(results, out)  # it may have been interrupted in the middle
        done = ", ".join(results["runs"]) or "nothing"
        console.print(f"\ninterrupted: {done} had finished" + (f", see {out}" if results["runs"] else ""), markup=False)
        signal.signal(signal.SIGINT, before)
        return 130
    finally:
        progress.close()
    report.tell(results, console)
    console.print(f"written to {out}: results.json, curves.png, small/ and grown/ (checkpoints)", markup=False)
    return 0


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def trained(plan, settings, data, seed, device, out, told):
    """Yield (run, result) for every run of `plan` as it finishes; told(run, share, bits per byte) hears of the others.

    RuntimeError if one fails. However this ends, no process is left behind.
    """
    waiting, left, busy, idle, processes = dict(plan), {None: None}, {}, [], []
    spawn = multiprocessing.get_context("spawn")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is this process's affair alone
    try:
        for _ in range(min(2, cores())):
            ours, theirs = spawn.Pipe()
            arguments = theirs, settings, data, seed, device, out
            processes.append(spawn.Process(target=_serve, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            idle.append(ours)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        while waiting or busy:
            for name in [name for name, (after, _) in waiting.items() if after in left][: len(idle)]:
                pipe = idle.pop()
                pipe.send((name, left[waiting.pop(name)[0]]))
                busy[pipe] = name
            for pipe in wait(busy, timeout=1):
                name = busy[pipe]
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"run {name}: its process ended; was it killed for memory?") from None
                if kind == "failed":
                    raise RuntimeError(f"run {name} failed:\n{value}")
                if kind == "told":
                    told(name, *value)
                    continue
                del busy[pipe]
                idle.append(pipe)
                left[name] = value.pop("left", None)
                yield name, value
            told()
        for pipe in idle:
            pipe.close()  # which ends its process
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _serve(*arguments):
    from growkit.demo.runs import serve  # here, in a process that has use for torch

    serve(*arguments)


class Teller:
    """Shows how far the runs are: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, console, plan):
        self.console, self.plan, self.share, self.bits = console, plan, dict.fromkeys(plan, 0.0), {}
        self.start = self.line = time.monotonic()
        self.bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
        self.task = self.bar.add_task("starting", total=sum(weight for _, weight in plan.values()))
        if console.is_terminal:
            self.bar.start()

    def told(self, name=None, share=0.0, bits=math.nan):
        if name:
            self.share[name], self.bits[name] = share, bits
        now = time.monotonic()
        done = sum(share * self.plan[name][1] for name, share in self.share.items())
        if self.bar.live.is_started:
            self.bar.update(self.task, completed=done, description=self.words(now, done))
        elif now - self.line >= LINE_EVERY:
            self.line = now
            self.console.print(f"{now - self.start:4.0f} s: {self.words(now, done)}", markup=False, soft_wrap=True)

    def words(self, now, done):
        going = [name for name in self.plan if 0 < self.share[name] < 1]
        words = ", ".join(f"{name} {self.share[name]:.0%} at {self.bits[name]:.2f} bits/byte" for name in going)
        if not done:
            return words or "starting"
        return f"{words}; about {(now - self.start) * (self.bar.tasks[0].total - done) / done:.0f} s left"

    def finished(self, name, result):
        self.share[name] = 1.0
        cost = f"{result['steps']} steps, {result['flops']:.2g} FLOPs, {result['cpu_seconds']:.0f} CPU s"
        self.console.print(f"{name}: {result['bits_per_byte']:.4f} bits/byte, {cost}", markup=False)

    def close(self):
        self.bar.stop()
