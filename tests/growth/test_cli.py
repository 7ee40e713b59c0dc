"""`growkit grow` and `growkit inspect` as they are called: what they print, what they leave, and their exit codes."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from growkit.__main__ import main  # noqa: E402
from growkit.growth import checkpoint, recipe  # noqa: E402

from growth.forks import fork  # noqa: E402  isort: skip
from growth.models import CONFIGS, model  # noqa: E402  isort: skip

SIZES = "--layers 4 --hidden-size 40"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(CONFIGS["gpt2"](24, 3, 2, 50), torch.float32).save_pretrained("small")
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_from_disk_to_disk_and_again_by_its_recipe(folder, capsys):
    words = [sys.executable, "-m", "growkit", "grow", *f"small big {SIZES}".split()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "layers 2 to 4, residual 24 to 40, heads 3 to 5, ffn 50 to 84" in done.stdout
    change = float(re.search(r"^big: outputs change by (\S+) relative, ", done.stdout, re.MULTILINE)[1])
    assert change < 1e-4
    big = transformers.AutoModelForCausalLM.from_pretrained("big")
    assert big.config.n_layer == 4 and names(folder) == ["big", "small"]
    assert {"README.md", "config.json", "generation_config.json", recipe.RECIPE} <= set(names(folder / "big"))
    for arguments in (["again"], ["small", "given"]):  # the recipe names SMALL, which may be given, too
        assert main(["grow", "--recipe", f"big/{recipe.RECIPE}", "--no-check", *arguments]) == 0
        assert f"{arguments[-1]}: not compared (--no-check)" in capsys.readouterr().out
        assert weights(folder / arguments[-1]) == weights(folder / "big")


def test_noise_is_replayed_to_the_same_bytes(folder, capsys):
    words = [*SIZES.split(), "--start", "lemon", "--seed", "3"]
    assert main(["grow", "small", "big", *words, "--noise", "0.2"]) == 0
    assert float(re.search(r"big: outputs change by (\S+) relative", capsys.readouterr().out)[1]) < 1e-4
    assert main(["grow", "--recipe", f"big/{recipe.RECIPE}", "--no-check", "again"]) == 0
    assert main(["grow", "small", "plain", *words, "--no-check"]) == 0
    assert weights(folder / "again") == weights(folder / "big") != weights(folder / "plain")
    assert main(["grow", "small", "none", *SIZES.split(), "--noise", "0.2"]) == 1
    assert "noise: got 0.2, but this start has no copies" in capsys.readouterr().err


def test_a_dry_run_tells_what_it_takes_and_writes_nothing(folder, capsys):
    assert main(["grow", "small", "big", *SIZES.split(), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in ("layers 2 to 4", "parameters 12,", "start lossless", "disk 0.00 GB, memory at most"):
        assert words in out
    assert names(folder) == ["small"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--hidden-size 64", "residual 32 to 64, heads 4 to 8, kv_heads 2 to 4, ffn 48 to 96"),
        ("--hidden-size 40", "residual 32 to 40, ffn 48 to 64"),  # five heads would not make two groups
        ("--hidden-size 64 --heads 4", "residual 32 to 64, ffn 48 to 96"),
        ("--hidden-size 64 --head-dim 8", "residual 32 to 64, ffn 48 to 96"),
    ],
)
def test_heads_follow_the_hidden_size(words, said, folder, capsys):
    model(CONFIGS["llama"](32, 4, 2, 48, 2)).save_pretrained("llama")
    assert main(["grow", "llama", "big", *words.split(), "--dry-run"]) == 0
    assert f": {said}\n" in capsys.readouterr().out


def test_a_folder_that_exists_stays_without_force(folder, capsys):
    (folder / "big").mkdir()
    (folder / "big/thesis.txt").write_text("years of work")
    words = ["grow", "small", "big", *SIZES.split(), "--no-check"]
    assert main(words) == 1
    assert "OUT: big exists already, expected a new name, or --force to replace it" in capsys.readouterr().err
    assert names(folder / "big") == ["thesis.txt"]
    assert main([*words, "--force"]) == 0
    assert "config.json" in names(folder / "big") and "thesis.txt" not in names(folder / "big")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("big", 2, "Missing argument 'SMALL', or --recipe FILE"),
        ("", 2, "Missing argument 'OUT'"),
        ("small big", 1, "expected sizes such as --layers 24, or --config FILE, or --params 1.3B"),
        ("small big --layers 0", 2, "--layers"),
        ("small big --layers 1", 1, "n_layer: got 1, expected at least 2"),
        ("small big --layers 4 --head-dim 9", 1, "--head-dim: gpt2 has no such size"),
        ("small big --layers 4 --learn 3", 1, "expected --data FILE|DIR"),
        ("small big --recipe small/config.json", 1, "expected a growkit_recipe.yaml"),
        ("big --recipe small/config.json --layers 4 --seed 1", 2, "expected it without --layers, --seed"),
        ("one two big --layers 4", 2, "Got 2 arguments and OUT"),
        ("nowhere big --layers 4", 1, "nowhere: expected a local folder"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_and_nothing_written(words, code, said, folder, capsys):
    assert main(["grow", *words.split()]) == code
    assert said in capsys.readouterr().err
    assert names(folder) == ["small"]


def in_a_fork(words, stdout, setup=lambda: None):
    """Exit code and stderr of `growkit` with these words, in a process that starts with everything imported."""
    read, write = os.pipe()
    pid = fork()
    if not pid:
        code = 70
        try:
            os.dup2(write, 2)
            os.dup2(stdout, 1)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            setup()
            code = main(words)
        except SystemExit as end:
            code = end.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    ("module", "moment", "said"),
    [
        (recipe, "open_checkpoint", "interrupted: nothing had finished"),
        (checkpoint, "_header", "interrupted: runs/1/big was not written"),
        (recipe, "compare", "interrupted: runs/1/big was not written"),
        (recipe, "_sync", "interrupted: runs/1/big was not written"),
    ],
    ids=("opening", "writing", "comparing", "at the end"),
)
def test_ctrl_c_leaves_nothing(module, moment, said, folder):
    def setup():
        call = getattr(module, moment)

        def interrupted(*arguments, **options):
            os.kill(os.getpid(), signal.SIGINT)
            return call(*arguments, **options)

        setattr(module, moment, interrupted)

    with open(os.devnull, "w") as nowhere:
        code, text = in_a_fork(["grow", "small", "runs/1/big", *SIZES.split()], nowhere.fileno(), setup)
    assert code == 130 and text.strip().endswith(said)
    assert names(folder) == ["small"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("words", (f"grow small big {SIZES}", "inspect small"))
def test_a_closed_pipe_is_quiet_and_leaves_no_part_of_a_checkpoint(words, folder):
    read, write = os.pipe()
    os.close(read)
    code, text = in_a_fork(words.split(), write)
    os.close(write)
    assert code == 1 and "Traceback" not in text and "Error" not in text
    assert all(not name.startswith(".") for name in names(folder))


def test_inspect_names_every_weight_and_what_it_does_not_understand(folder, capsys):
    assert main(["inspect", "small"]) == 0
    out = capsys.readouterr().out
    assert "GPT2LMHeadModel, model_type gpt2" in out and "not understood" not in out
    assert re.search(r"layers +2  n_layer\n", out) and re.search(r"h\.\*\.mlp\.c_fc\.weight +2 x \(", out)


def test_inspect_ends_with_1_where_a_weight_is_not_understood(folder, capsys, monkeypatch):
    class Adapted(transformers.GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.adapter = torch.nn.Linear(3, 4, bias=False)

    for package in (transformers, sys.modules["transformers"]):  # it puts another in its place while it is imported
        monkeypatch.setattr(package, "Adapted", Adapted, raising=False)
    Adapted(CONFIGS["gpt2"](24, 3, 2, 50)).save_pretrained("adapted")
    assert main(["inspect", "adapted"]) == 1
    assert re.search(r"adapter\.weight +not understood\n", capsys.readouterr().out)
    config = json.loads((folder / "small/config.json").read_text())
    (folder / "small/config.json").write_text(json.dumps(config | {"architectures": ["MyOwn"]}))
    assert main(["inspect", "small"]) == 1
    assert "names 'MyOwn', expected a model class of transformers" in capsys.readouterr().err
