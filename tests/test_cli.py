import importlib.util
import sys
import types

import pytest
import torch

import growkit
from growkit import cli


@pytest.fixture
def demo(monkeypatch):
    """A stand-in for growkit.demo that keeps what it was called with; the demo itself has tests of its own."""
    module = types.ModuleType("growkit.demo")
    module.calls = []
    module.run = lambda **options: module.calls.append(options) or 7
    monkeypatch.setitem(sys.modules, "growkit.demo", module)
    return module


@pytest.fixture
def without(monkeypatch):
    def hide(*packages):
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return hide


def test_info_lists_every_registered_op(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"growkit {growkit.__version__}" in out and f"torch {torch.__version__}" in out
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("growkit::")]
    assert registered
    for name in registered:
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name.removeprefix("growkit::")]]
        assert "cpu: reference" in line
        if "sophia" in name or "sampled" in name:
            assert "cuda: growkit.kernels.s" in line


def test_info_says_how_to_get_what_is_missing(capsys, without):
    packages = [package for package, _, _ in cli.OPTIONAL]
    without(*packages)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for package in packages:
        assert f"missing: pip install {package}" in out


def test_info_shows_versions(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cli, "OPTIONAL", (("pytest", "", ""), ("no_such_distribution", "", "")))
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"pytest        {pytest.__version__}" in out
    assert "present, version unknown" in out


@pytest.mark.parametrize(
    ("available", "built_for", "expected"),
    [(False, None, "this build of torch"), (False, "13.0", "sees no GPU"), (True, "13.0", "Some GPU")],
)
def test_info_says_why_there_is_no_cuda(capsys, monkeypatch, available, built_for, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.version, "cuda", built_for)
    cli.main(["info"])
    assert expected in capsys.readouterr().out


def test_demo_passes_its_flags_on(demo, tmp_path):
    flags = f"demo --data {tmp_path} --device cpu --seed 3 --out {tmp_path / 'out'} --steps-scale 0.5 --full"
    assert cli.main(flags.split()) == 7
    assert demo.calls == [
        {"data": tmp_path, "device": "cpu", "seed": 3, "out": tmp_path / "out", "steps_scale": 0.5, "full": True}
    ]


def test_demo_without_its_packages_names_the_command(capsys, demo, without):
    without(*cli.DEMO_NEEDS)
    assert cli.main(["demo"]) == 1
    assert "pip install transformers matplotlib rich" in capsys.readouterr().err
    assert not demo.calls


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--device cuda", ("--device", "'cuda'", "expected auto or cpu")),
        ("--device tpu", ("--device", "'tpu'", "expected auto, cpu or cuda")),
        ("--data no/such/file", ("--data", "'no/such/file'", "expected")),
        (f"--out {__file__}", ("--out", __file__, "expected a folder")),
        ("--steps-scale 0", ("--steps-scale", "'0'", "above 0")),
        ("--steps-scale nan", ("--steps-scale", "'nan'", "above 0")),
        ("--steps-scale many", ("--steps-scale", "'many'", "above 0")),
        ("--seed x", ("--seed", "'x'", "int")),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_demo_refuses_bad_flags(capsys, demo, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *flags.split()])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words)
    assert not demo.calls
