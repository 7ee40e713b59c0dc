import importlib.util
import os
import subprocess
import sys
import types

import click
import pytest
import torch

import growkit
from growkit import cli
from growkit.__main__ import main


@pytest.fixture
def demo(monkeypatch):
    """A stand-in for growkit.demo.story that keeps what it was called with; the demo itself has tests of its own."""
    module = types.ModuleType("growkit.demo.story")
    module.calls = []
    module.run = lambda **options: module.calls.append(options) or 7
    monkeypatch.setitem(sys.modules, "growkit.demo.story", module)
    return module


@pytest.fixture
def without(monkeypatch):
    def hide(*packages):
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return hide


COMMANDS = sorted(cli.command.commands)


@pytest.mark.parametrize("words", ([], ["--help"], ["-h"]), ids=" ".join)
def test_help_names_every_command(capsys, words):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_its_default_and_an_example(capsys, name):
    assert main([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    options = [option for option in cli.command.commands[name].params if isinstance(option, click.Option)]
    for option in options:
        assert option.opts[0] in option.help.partition("e.g. ")[2]
    assert shown.count("default: ") == len([option for option in options if not option.required])


@pytest.mark.parametrize("words", ("demo --wrong", "bench --wrong", "info --wrong"))
def test_wrong_use_prints_the_usage_of_that_command(capsys, words):
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert f"Usage: growkit {words.split()[0]}" in err and "--wrong" in err


def in_a_process(*words, before="", **options):
    """`growkit` with `words`, in a Python that runs the statements `before` first."""
    script = f"import os, signal, sys\n{before}\nfrom growkit.__main__ import main\nsys.exit(main({list(words)!r}))"
    return subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, timeout=300, **options)


@pytest.mark.parametrize("words", (["--help"], ["--version"], ["demo", "--help"], ["demo", "--wrong"]), ids=" ".join)
def test_help_does_not_wait_for_torch(words):
    done = in_a_process(*words, before="sys.modules['torch'] = None", stdout=subprocess.DEVNULL)
    assert done.returncode == (2 if "--wrong" in words else 0), done.stderr


INTERRUPTS = """
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("moment", ("click", "torch", "torch.nn"))
def test_ctrl_c_during_import_is_one_line(moment):
    done = in_a_process("info", before=INTERRUPTS.format(moment))
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted: nothing had finished"


@pytest.mark.parametrize("words", (["--help"], ["info"], ["bench", "--list"]), ids=" ".join)
def test_closed_pipe_is_quiet(words):
    read, write = os.pipe()
    os.close(read)
    done = in_a_process(*words, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_command_without_click_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "click", None)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "growkit: the command needs click: pip install click\n"


def test_info_is_short_and_counts_every_operator(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"growkit {growkit.__version__}" in out and f"torch {torch.__version__}" in out
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("growkit::")]
    compiled = sum(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU") for name in registered)
    counts = ([f"{compiled} growkit._C"] if compiled else []) + [f"{len(registered) - compiled} reference"]
    assert f"{len(registered)} operators on cpu: {', '.join(counts)}" in out
    assert len(out.splitlines()) < 12


def test_verbose_info_lists_every_registered_op(capsys):
    assert main(["info", "--verbose"]) == 0
    out = capsys.readouterr().out
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("growkit::")]
    assert registered
    for name in registered:
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name.removeprefix("growkit::")]]
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        assert f"cpu: {'growkit._C' if compiled else 'reference'}" in line
        if "sophia" in name or "sampled" in name:
            assert "cuda: growkit.kernels.s" in line


@pytest.mark.parametrize("words", (["info"], ["info", "-v"]), ids=" ".join)
def test_info_says_how_to_get_what_is_missing(capsys, without, words):
    packages = [package for package, _, _ in cli.OPTIONAL]
    without(*packages)
    assert main(words) == 0
    out = capsys.readouterr().out
    for package in packages:
        assert f"pip install {package}" in out


def test_info_shows_versions(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cli, "OPTIONAL", (("pytest", "", ""), ("no_such_distribution", "", "")))
    assert main(["info", "--verbose"]) == 0
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
    main(["info"])
    assert expected in capsys.readouterr().out


def test_demo_passes_its_flags_on(demo, tmp_path):
    flags = f"demo --data {tmp_path} --device cpu --seed 3 --out {tmp_path / 'new' / 'out'} --steps-scale 0.5"
    assert main(flags.split()) == 7
    assert demo.calls == [
        {
            "data": tmp_path,
            "device": "cpu",
            "seed": 3,
            "out": tmp_path / "new" / "out",
            "steps_scale": 0.5,
            "sophia": False,
        }
    ]
    assert not list(tmp_path.iterdir())  # that --out can be written was tried, and nothing left


def test_demo_without_its_packages_names_the_command(capsys, demo, without):
    without(*cli.DEMO_NEEDS)
    assert main(["demo"]) == 1
    assert "pip install transformers matplotlib" in capsys.readouterr().err
    assert not demo.calls


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--device cuda", ("--device", "'cuda'", "expected auto or cpu")),
        ("--device tpu", ("--device", "'tpu'", "'auto', 'cpu', 'cuda'")),
        ("--data no/such/file", ("--data", "'no/such/file'", "does not exist")),
        (f"--out {__file__}", ("--out", __file__, "is a file")),
        (f"--out {__file__}/below", ("--out", __file__, "cannot be written")),
        ("--out /dev/null/below", ("--out", "/dev/null/below", "cannot be written")),
        ("--steps-scale 0", ("--steps-scale", "'0'", "above 0")),
        ("--steps-scale many", ("--steps-scale", "'many'", "above 0")),
        ("--steps-scale inf", ("--steps-scale", "'inf'", "above 0")),
        ("--steps-scale nan", ("--steps-scale", "'nan'", "above 0")),
        ("--seed x", ("--seed", "'x'", "integer")),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_demo_refuses_bad_flags(capsys, demo, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["demo", *flags.split()]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert not demo.calls
