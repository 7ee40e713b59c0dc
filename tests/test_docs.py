"""What the documents say that a program can check: the quick start's code, links, files, names of sizes."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

import growkit

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Where the project lives is said once, in pyproject.toml; every other page has to say the same.
PROJECT = re.search(r'^Homepage = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
HOME = f"{PROJECT}/blob/main/"

# README's comparison: its row, and the test of what growkit's cell says.
TESTED = {
    "training loop": "optim/test_attach.py::test_training_with_attach_lowers_the_loss",
    "curvature": "optim/test_attach.py::test_refreshes_follow_the_schedule",
    "optimizer state, bytes a parameter": "test_docs.py::test_bytes_of_state_are_those_of_the_readme",
    "float32 step on CPU": "optim/test_sophia.py::test_training_loop_of_the_official_script_is_bit_equal",
    "a model deeper": "growth/test_families.py::test_lossless_growth_in_every_direction",
    "a model wider": "growth/test_families.py::test_lossless_growth_in_every_direction",
    "the map is learned": "growth/test_fit.py::test_fit_gives_the_operator_the_gradient_of_the_whole_map",
    "lossless": "growth/test_families.py::test_lossless_growth_in_every_direction",
}


def ids(page):
    return page.name


def test_the_code_of_the_quick_start_runs():
    """With small models and few batches of the names that it takes for granted."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    batches = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(64, (11, 2, 8))]
    names = {"model": model, "small_model": model, "batches": batches}
    for block in re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/index.md").read_text(), re.DOTALL | re.MULTILINE):
        for written, here in (("24", "4"), ("1024", "64"), ("16", "4"), ("steps=100", "steps=5")):
            block = re.sub(rf"\b{written}\b", here, block)
        exec(block, names)
    assert names["optimizer"].stats()["refreshes"] == 2 and names["big_model"].config.n_layer == 4


def comparison():
    """{row: its cells} of README's table of growkit beside others; the first two are growkit's and AdamW's."""
    table = (ROOT / "README.md").read_text().partition("| | growkit |")[2].partition("\n\n")[0]
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:])
    return {row: cells for row, *cells in rows}


def test_every_cell_of_the_comparison_has_a_test_or_a_source():
    found = comparison()
    assert found.keys() == TESTED.keys()
    for test in TESTED.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test
    for cells in found.values():
        for cell in cells[2:]:
            assert cell in ("", "–") or re.fullmatch(r"\[.*\]\[\w+\]", cell), f"{cell}: names no source"


def test_bytes_of_state_are_those_of_the_readme():
    def bytes_of(make):
        p = torch.nn.Parameter(torch.ones(256, 256))
        p.grad = torch.ones_like(p)
        optimizer = make([p])
        optimizer.step()
        return sum(t.nbytes for t in optimizer.state[p].values() if t.ndim) / p.numel()

    dtypes = (None, torch.bfloat16, "8bit")
    ours = [bytes_of(lambda ps, dtype=dtype: growkit.SophiaG(ps, state_dtype=dtype)) for dtype in dtypes]
    cells = comparison()["optimizer state, bytes a parameter"]
    assert cells[0] == "{:g}; {:g} in bfloat16; {:.1f} in 8 bits".format(*ours)
    assert cells[1] == f"{bytes_of(torch.optim.AdamW):g}"


def test_the_project_has_one_address():
    for file in (*DOCUMENTS, ROOT / "mkdocs.yml", ROOT / "CITATION.cff", ROOT / "pyproject.toml"):
        for found in re.findall(r"https://(?:raw\.githubusercontent|github)\.com/[\w-]+/growkit\b", file.read_text()):
            assert found.replace("raw.githubusercontent", "github") == PROJECT, file.name


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
            target = (file.parent / path).resolve()
            assert target.exists(), link
            inside = file.parent.name not in ("docs", "results") or target.is_relative_to(ROOT / "docs")
            assert inside, f"{link}: the site, whose strict build this fails, has docs/ alone: an absolute link works"


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
    assert named.keys() == set(families)
    for model_type, sizes in named.items():
        assert sizes <= {size.field for size in families[model_type].fields().values()}, model_type
    starts = set(get_args(pytest.importorskip("growkit.growth.ligo").StartName))
    assert starts <= set(re.findall(r'`"(\w+)"', (ROOT / "docs/growing.md").read_text()))
