"""What the documents say that a program can check: the quick start's code, links, files, names of sizes."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOME = "https://github.com/growkit/growkit/blob/main/"


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
