"""The package as a user gets it: the wheel's content, a clean install, the README's code, and who imports whom."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def command(*words, cwd, **environment):
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PURE = {"GROWKIT_SKIP_BUILD": "1", "GROWKIT_FORCE_CUDA": ""}  # test_build.py builds the extension


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """sdist and, from it, the wheel, out of a copy: a stale build/ or egg-info must not leak into either."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"))
    command(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder, **PURE)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def clean_python(archives, tmp_path_factory):
    """A fresh venv with the wheel in it, which sees torch and the rest of this environment, but no checkout."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    purelib = Path(command(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # A path in a .pth file: the .pth files in there, such as that of an editable growkit, are not followed.
    (purelib / "outer.pth").write_text(str(Path(torch.__file__).parents[1]))
    command(python, "-m", "pip", "install", "--no-index", "--no-deps", "--ignore-installed", archives[1], cwd=home)
    return python


def test_sdist_can_run_its_own_tests(archives):
    with tarfile.open(archives[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "kernels/__init__.py"} <= names
    for folder, pattern in (
        ("tests", "**/*.py"),
        ("tests", "**/*.cpp"),
        ("csrc", "*"),
        ("packaging", "*"),
    ):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern)} <= names


def test_wheel_holds_growkit_and_nothing_else(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = wheel.namelist()
        (top_level,) = [wheel.read(name).decode().split() for name in names if name.endswith("top_level.txt")]
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "growkit").glob("**/*.py")} | {"growkit/py.typed"}
    expected |= {"growkit" / path.relative_to(ROOT) for path in (ROOT / "kernels").glob("**/*.py")}
    assert {name for name in names if ".dist-info/" not in name} == {str(name) for name in expected}
    assert top_level == ["growkit"]  # above all no top-level `kernels`: that is Hugging Face's package
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_archives_show_well_on_pypi(archives):
    command(sys.executable, "-m", "twine", "check", "--strict", *archives, cwd=archives[0].parent)


def test_local_version(archives):
    said = command(sys.executable, "setup.py", "--version", cwd=ROOT, GROWKIT_LOCAL_VERSION="cu130", **PURE)
    assert said.split()[-1] == archives[1].name.split("-")[1] + "+cu130"


def test_installed_wheel_runs_the_readme(clean_python, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks) + "\nprint(growkit.__file__)\n")
    assert str(clean_python.parents[1]) in command(clean_python, "-I", script, cwd=tmp_path, HF_HUB_OFFLINE="1")


def test_import_and_info_need_only_torch(clean_python, tmp_path):
    script = tmp_path / "bare.py"
    script.write_text(
        "import sys\n"
        "for name in ('triton', 'transformers', 'safetensors', 'matplotlib', 'rich', 'click'):\n"
        "    sys.modules[name] = None\n"
        "import growkit, growkit.__main__, growkit.kernels\n"
        "growkit.SophiaG, growkit.SophiaH, growkit.LiGO\n"
        "assert growkit.__main__.main(['info']) == 1\n"
        "del sys.modules['click']\n"
        "sys.exit(growkit.__main__.main(['info']))\n"
    )
    assert "growing Hugging Face models" in command(clean_python, "-I", script, cwd=tmp_path)


def test_public_names_come_when_asked_for(tmp_path):
    """`import growkit` alone imports no torch, and every way to name what it exports finds the same thing."""
    script = (
        "import sys, growkit\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(growkit.__all__) <= set(dir(growkit)) and not hasattr(growkit, 'SophiaX')\n"
        "from growkit import *\n"
        "import growkit.optim, growkit.growth\n"
        "assert SophiaG is growkit.SophiaG is growkit.optim.SophiaG and LiGO is growkit.growth.LiGO\n"
        "assert not hasattr(growkit.integrations, 'keras') and 'transformers' not in sys.modules\n"
    )
    command(sys.executable, "-c", script, cwd=tmp_path)


# Lower layers first: a module imports from layers below its own and from its own package.
LAYERS = (
    ("growkit.reference", "growkit.text", "growkit.warn", "growkit._C"),
    ("growkit.kernels", "growkit.kron"),
    ("growkit.ops",),
    ("growkit.optim",),
    ("growkit.growth",),
    ("growkit",),
    ("growkit.integrations",),
    ("growkit.demo", "growkit.bench"),
    ("growkit.cli",),
    ("growkit.__main__",),
)
HEIGHT = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def part(name):
    """The longest entry of LAYERS that a dotted name lies in."""
    while name not in HEIGHT:
        name = name.rpartition(".")[0]
    return name


def imports(path):
    """Dotted names of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from names


def test_imports_go_one_way():
    files = {path: path.relative_to(ROOT) for path in (ROOT / "growkit").glob("**/*.py")}
    files |= {path: Path("growkit") / path.relative_to(ROOT) for path in (ROOT / "kernels").glob("**/*.py")}
    for path, place in files.items():
        here = part(".".join(place.with_suffix("").parts).removesuffix(".__init__"))
        for there in (part(name) for name in imports(path) if name.split(".")[0] == "growkit"):
            assert here == there or HEIGHT[there] < HEIGHT[here], f"{place} imports {there}"


def test_the_oracle_imports_only_torch():
    for path in (ROOT / "growkit/reference").glob("*.py"):
        assert all(re.match(r"torch$|growkit\.reference\.", name) for name in imports(path)), path


def test_unwritten_outputs_are_nan():
    """The fixture of conftest.py works, so that every other test sees what was never written."""
    x = torch.ones(3)
    made = torch.empty(3), torch.empty_like(x), torch.empty_strided((3,), (1,)), x.new_empty(3)
    assert all(tensor.isnan().all() for tensor in made)


def test_what_was_compiled_of_other_inputs_is_not_used_again(compiled_once, tmp_path):
    """The fixture of conftest.py: the content of each file and every flag count, and a failed build leaves nothing."""
    source, home, made = tmp_path / "source", tmp_path / "home", []
    source.mkdir(), home.mkdir()
    (source / "a.cu").write_text("//")

    def make(folder):
        made.append(folder)
        (folder / "out").write_text(str(len(made)))

    first = compiled_once(make, source, "-O2", home=home)
    assert compiled_once(make, source, "-O2", home=home) == first and (first / "out").read_text() == "1"
    assert compiled_once(make, source, "-O3", home=home) != first
    (source / "a.cu").write_text("// ")
    assert compiled_once(make, source, "-O2", home=home) != first
    (source / "b.h").write_text("")
    assert compiled_once(make, source, "-O2", home=home) != first and len(made) == 4

    def fail(folder):
        (folder / "out").write_text("half")
        raise ValueError("no compiler")

    with pytest.raises(ValueError, match="no compiler"):
        compiled_once(fail, source, "-O1", home=home)
    assert compiled_once(make, source, "-O1", home=home) and len(made) == 5
