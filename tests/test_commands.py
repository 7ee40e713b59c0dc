"""Every command that the first pages tell a reader to type is run, in a form that is over within seconds.

COMMANDS is the one place that says what is shortened: a command that a page has and COMMANDS lacks is an error, and so
is one that no page has. The commands of the other pages take minutes: there, what they name must exist.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import venv
from pathlib import Path

import pytest
import torch

from growkit.__main__ import main
from growkit.demo.settings import read_text

ROOT = Path(__file__).parents[1]
FIRST_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/index.md", "docs/growing.md")]
OTHER_PAGES = sorted({*(ROOT / "docs").rglob("*.md")} - {*FIRST_PAGES})

# A command as its page has it: as it is run here, and what its output must say. They run in this order in one folder,
# {here}, with a checkpoint SMALL and a text in text/; pip in a copy of the checkout, make in the checkout.
DEMO = "--data {here}/text --steps-scale 0.003 --out {here}/demo"
COMMANDS = {
    "pip install '.[demo]'": ("pip install '.[demo]'", "Successfully installed growkit"),
    "growkit info": ("growkit info", "operators on cpu"),
    "growkit demo": (f"growkit demo {DEMO}", "Everything counted"),
    "growkit inspect SMALL": ("growkit inspect SMALL", "GPT2LMHeadModel, model_type gpt2"),
    "growkit grow SMALL BIG --layers 24 --hidden-size 1024 --dry-run": (
        "growkit grow SMALL BIG --layers 24 --hidden-size 1024 --dry-run",
        "residual 32 to 1024",
    ),
    "growkit grow SMALL BIG --params 1.3B --learn 100 --data text/": (
        "growkit grow SMALL BIG --params 100K --learn 3 --data text/ --context 32",
        "learned: loss",
    ),
    "growkit grow SMALL OUT --layers 24 --hidden-size 1024 --dry-run": (
        "growkit grow SMALL OUT --layers 24 --hidden-size 1024 --dry-run",
        "layers 2 to 24",
    ),
    "growkit grow SMALL OUT --layers 24 --hidden-size 1024": (
        "growkit grow SMALL OUT --layers 4 --hidden-size 64",
        "OUT: outputs change by",
    ),
    "growkit grow --recipe OUT/growkit_recipe.yaml NEW": (
        "growkit grow --recipe OUT/growkit_recipe.yaml NEW",
        "NEW: outputs change by",
    ),
    "make demo": (f"make demo ARGS='{DEMO}'", "Everything counted"),
    "make check": ("make check ARGS='-n 0 tests/test_text.py'", "passed"),
    "make test": ("make test ARGS=tests/test_text.py", "passed"),
    "make docs": ("make docs ARGS='--site-dir {here}/site'", ""),
    "make bench": ("make bench ARGS='-k cpu-expand-query --rounds 1 --benchmark-storage=file://{here}/runs'", "passed"),
}
SLOW = ("make demo", "make docs", "make bench")  # 20 s and more


def commands(page):
    """The words of every command in a page's `sh` blocks."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def test_the_commands_of_the_first_pages_are_those_that_are_run():
    on_pages = {tuple(words) for page in FIRST_PAGES for words in commands(page)}
    run_here = {tuple(shlex.split(command)) for command in COMMANDS}
    assert on_pages == run_here, f"{on_pages - run_here} run nowhere, {run_here - on_pages} on no page"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A reader's folder: a text, and a checkpoint of a model of bytes with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    here = tmp_path_factory.mktemp("reader")
    (here / "text").mkdir()
    (here / "text/topics.txt").write_bytes(read_text()[1][:24_000])
    shape = {"vocab_size": 256, "n_positions": 64, "n_layer": 2, "n_embd": 32, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(here / "SMALL")
    letters = Tokenizer(models.BPE({chr(i): i for i in range(256)}, [], unk_token="\0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(here / "SMALL")
    return here


def of_a_clean_environment(words, here):
    """pip, with what is installed in this environment in place of an index: names and extras must be met by it."""
    shutil.copytree(ROOT, here / "growkit", ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info"))
    venv.create(here / "venv", symlinks=True)
    python = here / "venv/bin/python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = Path(subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip())
    (purelib / "outer.pth").write_text(str(Path(torch.__file__).parents[1]))
    options = {"cwd": here / "growkit", "env": os.environ | {"GROWKIT_SKIP_BUILD": "1"}}
    return [python, "-m", *words, "--no-index", "--no-build-isolation"], options


def of_this_checkout(words):
    """make, in this checkout, whose .venv is taken as it is: what would be installed is installed."""
    if shutil.which("make") is None or not (ROOT / ".venv/bin").exists():
        pytest.skip("needs make, and the .venv that it made")
    stamps = [f"--old-file={stamp.relative_to(ROOT)}" for stamp in (ROOT / ".venv").glob(".[ie]*-*")]
    return [words[0], *stamps, *words[1:]], {"cwd": ROOT}


@pytest.mark.parametrize("command", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in COMMANDS])
def test_command(command, here, capfd, monkeypatch):
    run, says = COMMANDS[command]
    words = shlex.split(run.format(here=here))
    if words[0] == "growkit":
        monkeypatch.chdir(here)
        code = main(words[1:])
    else:
        prepared, options = of_this_checkout(words) if words[0] == "make" else of_a_clean_environment(words, here)
        code = subprocess.run(prepared, **options).returncode
    out, err = capfd.readouterr()
    assert code == 0 and says in out, out + err


@pytest.mark.parametrize("page", OTHER_PAGES, ids=lambda page: page.name)
def test_what_the_commands_of_the_other_pages_name_exists(page, capsys):
    for words in commands(page):
        while re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        if words[0] == "growkit":
            assert main([words[1], "--help"]) == 0
            options = capsys.readouterr().out
            assert all(word in options for word in words[2:] if word.startswith("--")), words
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words
        elif words[0] in ("python", "torchrun", "bash") or words[0].endswith(".sh"):
            (script,) = [word for word in words if word.endswith((".py", ".sh"))]
            assert (ROOT / script).exists(), words
        elif words[0] == "make":
            makefile = (ROOT / "Makefile").read_text()
            assert all(f"\n{word}:" in makefile for word in words[1:] if "=" not in word), words
        else:
            assert words[:2] == ["pip", "install"], words
