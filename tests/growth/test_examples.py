"""The examples of growth, thinned: every run costs what it may, and growth loses nothing."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def grow_vit():
    path = Path(__file__).parents[2] / "examples" / "grow_vit.py"
    spec = importlib.util.spec_from_file_location("grow_vit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grow_vit(grow_vit, capsys):
    (runs,) = grow_vit.main(["--scale", "0.05", "--seeds", "1"])
    out = capsys.readouterr().out
    assert all(f"| {name} | {steps} | " in out for name, (steps, _, _) in runs.items())
    *_, fitted, _, scratch, small = runs.values()
    ends = [runs[name] for name in ("grown, trained on", "grown, fitted, trained on")] + [scratch, small]
    spent = [flops for _, flops, _ in ends]
    assert max(spent) - min(spent) < 0.1 * max(spent) and 0 < fitted[1] < min(spent)
    assert runs["... and right after growth"][2] == runs["small, when it is grown"][2]  # percent of images
    assert small[2] < 85  # chance is 90
