"""Where records are: one file a run while a study goes on, one file a study when it is done.

A run is named by a hash of its config. Its file appears whole, and beside it a lock says that a process is at it, so
that several can work at one study, and one that was interrupted goes on.
"""

import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path


def key(config):
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """folder: holds runs/KEY.json, of single runs, and STUDY.json, of which each line is a record."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, folder / "runs"
        self._known, self._packed = {}, {}
        for file in folder.glob("*.json"):
            for record in json.loads(file.read_text()).get("records", ()):  # times.json has none
                self._known[key(record["config"])] = record
                self._packed[key(record["config"])] = file.stem

    def get(self, config):
        """The record of `config`, or None."""
        name = key(config)
        file = self.runs / f"{name}.json"
        if name not in self._known and file.exists():
            self._known[name] = json.loads(file.read_text())
        return self._known.get(name)

    def put(self, record):
        self.runs.mkdir(parents=True, exist_ok=True)
        _replace(self.runs / f"{key(record['config'])}.json", json.dumps(record))

    @contextmanager
    def claim(self, config):
        """Whether this process, and no other, may run `config` now; the lock goes with the process."""
        self.runs.mkdir(parents=True, exist_ok=True)
        with open(self.runs / f"{key(config)}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield self.get(config) is None

    def pack(self, study, about, configs):
        """STUDY.json: what the runs were done on, and the records that there are and no other study's file has."""
        own = [config for config in configs if self._packed.get(key(config), study) == study]
        found = {key(config): record for config in own if (record := self.get(config)) is not None}
        if not found:
            return
        self._packed |= dict.fromkeys(found, study)
        records = ",\n".join(json.dumps(_rounded(record)) for record in found.values())
        _replace(self.folder / f"{study}.json", f'{{"about": {json.dumps(about)},\n"records": [\n{records}\n]}}\n')


def _rounded(value):
    """Results to 5 digits: what is behind them is noise."""
    if isinstance(value, dict):
        return {name: each if name == "config" else _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _replace(file, text):
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, file)
