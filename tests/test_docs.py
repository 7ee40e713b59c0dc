"""What the documents say that a program can check: commands, links, names of sizes."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from growkit.__main__ import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HOME = "https://github.com/growkit/growkit/blob/main/"


def commands(file):
    for block in re.findall(r"^```sh\n(.*?)^```", file.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def ids(value):
    return value.name if isinstance(value, Path) else " ".join(value)


@pytest.mark.parametrize(
    ("file", "words"), [(file, words) for file in DOCUMENTS[:3] for words in commands(file)], ids=ids
)
def test_commands_of_the_first_pages_are_right(file, words, capsys):
    """make: the target exists. pip: its extra exists. growkit: its words are understood; the demo has tests of its own,
    and the wheel's tests install it in a clean environment."""
    if words[0] == "make":
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        target = [word for word in words[1:] if "=" not in word]
        done = subprocess.run(["make", "--question", *target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr  # 2: no such target
    elif words[0] == "pip":
        what = re.fullmatch(r"\.(?:\[(\w+)\])?", words[-1])
        assert words[1] == "install" and what, words
        extras = (
            (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
        )
        assert what[1] is None or re.search(rf"^{what[1]} = \[", extras, re.MULTILINE)
    elif words[0] == "growkit":
        assert main([*words[1:2], "--help"]) == 0
        options = capsys.readouterr().out
        assert all(word in options for word in words[2:] if word.startswith("--"))
    else:
        assert words[0] in ("python", "torchrun", ".venv/bin/pre-commit", "OMP_NUM_THREADS=1"), words


@pytest.mark.parametrize("file", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(file):
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)", text, re.MULTILINE)
    for link in links:
        path = link.partition("#")[0]
        if path.startswith(HOME):
            assert (ROOT / path.removeprefix(HOME)).exists(), link
        elif not re.match(r"https?://", path):
            assert file.name != "README.md", f"{link}: PyPI shows this page, where only absolute links work"
            assert (file.parent / path).exists(), link


def test_files_named_in_documents_exist():
    for file in DOCUMENTS:
        folders = "growkit|kernels|csrc|tests|benchmarks|examples|packaging|docs"
        for name in re.findall(rf"`((?:{folders})/[\w/.]+)`", file.read_text()):
            assert (ROOT / name).exists() or "X" in name, f"{file.name}: {name}"


def test_families_of_the_growth_page_grow_by_the_names_it_gives():
    families = pytest.importorskip("growkit.growth.families", reason="needs growkit[hf]").FAMILIES
    rows = re.findall(r"^\| (`.*?`) \| (`.*`) \|$", (ROOT / "docs/growing.md").read_text(), re.MULTILINE)
    named = {}
    for types, sizes in rows:
        for model_type in re.findall(r"`(\w+)`", types):
            named[model_type] = set(re.findall(r"`(\w+)`", sizes))
    assert named and named.keys() <= set(families)
    for model_type, sizes in named.items():
        assert sizes <= {size.field for size in families[model_type].fields().values()}, model_type
