"""The public API as mypy and pyright see it: right calls are clean, and every wrong one is reported on its line."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import growkit

HERE = Path(__file__).parent
FILES = [HERE / "right.py", HERE / "wrong.py"]


def mypy(compiled_once):
    pytest.importorskip("mypy")
    # The cache is mypy's own: types of torch, which take most of the time, are read once.
    words = [sys.executable, "-m", "mypy", "--output=json", "--follow-imports=silent", *FILES]
    done = subprocess.run(words, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode in (0, 1), done.stdout + done.stderr
    for line in done.stdout.splitlines():
        found = json.loads(line)
        if found["severity"] == "error":
            yield Path(found["file"]).name, found["line"], found["message"]


def pyright(compiled_once):
    pytest.importorskip("pyright")

    def make(folder):  # it keeps nothing of torch from run to run, so what it said of these files is kept
        words = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *FILES]
        done = subprocess.run(words, capture_output=True, text=True, cwd=HERE.parents[1])
        assert done.returncode in (0, 1), done.stdout + done.stderr
        (folder / "said.json").write_text(done.stdout)

    versions = [importlib.metadata.version(name) for name in ("pyright", "torch")]
    said = compiled_once(make, *FILES, Path(growkit.__path__[0]), versions, sys.prefix) / "said.json"
    for found in json.loads(said.read_text())["generalDiagnostics"]:
        if found["severity"] == "error":
            yield Path(found["file"]).name, found["range"]["start"]["line"] + 1, found["message"]


@pytest.mark.parametrize("checker", [mypy, pyright], ids=lambda checker: checker.__name__)
def test_right_calls_are_clean_and_wrong_ones_reported(checker, compiled_once):
    found = {(file, line): message for file, line, message in checker(compiled_once)}
    wrong = {
        ("wrong.py", number)
        for number, line in enumerate(FILES[1].read_text().splitlines(), start=1)
        if line.endswith("# wrong")
    }
    assert found.keys() == wrong, found
