"""The compiled extension as far as a machine without a GPU sees it: sources, setup.py, the library, its plans."""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import setuptools
import torch
from compilers import lacking, needs_compiler, needs_nvcc, nvcc_home, toolchain
from hypothesis import given, settings
from hypothesis import strategies as st

import growkit.ops  # noqa: F401, for the schemas
from growkit.kernels import cpu

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc"
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def run(*words, cwd, fails=False, **environment):
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def checkout(folder):
    """A copy of what setup.py reads, so that nothing is written into the checkout."""
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "growkit", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


LOAD = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader('_C', sys.argv[1])
_C = importlib.util.module_from_spec(importlib.util.spec_from_loader('_C', loader))
loader.exec_module(_C)
"""  # of the library sys.argv[1], in a process of its own: a second growkit._C in one process would be the first again


# --- without a compiler ---


def test_csrc_uses_only_the_stable_abi():
    allowed = re.compile(r"torch/(headeronly|csrc/stable)/|cuda_|pybind11/|dlfcn\.h$|[a-z_]+$")
    own = {path.name for path in SOURCE.iterdir()}
    found = 0
    for path in SOURCE.iterdir():
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^">]+)', path.read_text(), re.MULTILINE):
            assert name in own or allowed.match(name), f"{path.name} includes {name}"
            found += "torch/" in name
    assert found  # the search sees what it is meant to see
    for name in ("launch.h", "build.h", "bindings.cpp", "cpu.h", "cpu.cpp"):  # host code: no torch, no CUDA
        assert not re.search(r"#\s*include\s*[<\"](torch|cuda)", (SOURCE / name).read_text()), name


def test_schemas_stay_in_python():
    code = "".join(path.read_text() for path in SOURCE.iterdir())
    assert not re.search(r"STABLE_TORCH_LIBRARY(_FRAGMENT)?\(", code)
    registered = set(re.findall(r'm\.impl\("(\w+)"', code))
    assert registered == {"kron_mix_", "kron_mix_backward_", "kron_gather_"}
    assert all(hasattr(torch.ops.growkit, name) for name in registered)


def test_sums_use_no_float_atomics():
    assert not any("atomicAdd" in path.read_text() for path in SOURCE.iterdir())


# --- setup.py in throw-away environments ---


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A venv that has setuptools and nothing else; tests lay stand-ins for torch and nvcc beside it."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, symlinks=True)
    here = Path(setuptools.__file__).parents[1]
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        if (here / name).exists():
            (site / name).symlink_to(here / name)
    return home / "bin" / "python"


NO_TORCH, CPU, CUDA_12, CUDA_13 = None, "None", "'12.8'", "'13.0'"
ALL = ("g++", "ninja", "nvcc", "pybind11")
NO_CUDA, NOTHING = "no CUDA kernels in the compiled extension: ", "no compiled extension: "


@pytest.mark.skipif(lacking() == "no Python.h", reason="no Python.h")
@pytest.mark.parametrize(("torch_cuda", "present", "environment", "said", "built"), [
    (NO_TORCH, ALL, {}, NO_CUDA + "torch is not installed", "cpu"),
    (CPU, ALL, {}, NO_CUDA + "torch 2.99 has no CUDA", "cpu"),
    (CPU, ALL[:2] + ALL[3:], {}, NO_CUDA + "no nvcc", "cpu"),
    (CUDA_13, ALL[:2] + ALL[3:], {}, NO_CUDA + "no nvcc", "cpu"),
    (CUDA_12, ALL, {}, NO_CUDA + "nvcc is of CUDA 13, torch 2.99 of CUDA 12.8", "cpu"),
    (CUDA_13, ALL, {}, "", "cuda"),
    (CUDA_13, ALL[1:], {}, NOTHING + "g++ is not on PATH", None),
    (CUDA_13, ALL[1:], {"CXX": "sh -c"}, "", "cuda"),
    (CPU, ("g++", "pybind11"), {}, NOTHING + "ninja is not on PATH", None),
    (CPU, ("g++", "ninja"), {}, NOTHING + "pybind11 is not installed", None),
    (CUDA_13, ALL, {"GROWKIT_SKIP_CUDA_BUILD": "1"}, NO_CUDA + "GROWKIT_SKIP_CUDA_BUILD=1", "cpu"),
    (CUDA_13, ALL, {"GROWKIT_SKIP_BUILD": "1"}, NOTHING + "GROWKIT_SKIP_BUILD=1", None),
    (CPU, ALL, {"GROWKIT_FORCE_CUDA": "1"}, "", "cuda"),
    (CUDA_12, ALL, {"GROWKIT_FORCE_CUDA": "1"}, "", "cuda"),
    (CPU, ("g++", "ninja", "pybind11"), {"GROWKIT_FORCE_CUDA": "1"}, "GROWKIT_FORCE_CUDA=1, but: no nvcc", "fails"),
    (NO_TORCH, ALL, {"GROWKIT_FORCE_CUDA": "1"}, "GROWKIT_FORCE_CUDA=1, but: torch is not installed", "fails"),
    (CPU, ALL[1:], {"GROWKIT_FORCE_CUDA": "1"}, "GROWKIT_FORCE_CUDA=1, but: g++ is not on PATH", "fails"),
    (CUDA_13, ALL, {"GROWKIT_FORCE_CUDA": "1", "GROWKIT_SKIP_BUILD": "1"}, "but: GROWKIT_SKIP_BUILD=1", "fails"),
])  # fmt: skip
def test_setup_decides_what_to_build_and_says_why(torch_cuda, present, environment, said, built, bare_python, tmp_path):
    source, modules, programs = checkout(tmp_path), tmp_path / "modules", tmp_path / "bin"
    stand_ins = {"torch/__init__.py": "__version__ = '2.99'\nfrom torch import version\n"} if torch_cuda else {}
    stand_ins |= {"torch/version.py": f"cuda = {torch_cuda}\n"} if torch_cuda else {}
    stand_ins |= {"pybind11/__init__.py": ""} if "pybind11" in present else {}
    for name, text in stand_ins.items():
        (modules / name).parent.mkdir(parents=True, exist_ok=True)
        (modules / name).write_text(text)
    programs.mkdir()
    (programs / "sh").symlink_to("/bin/sh")
    for name in set(present) - {"pybind11"}:
        where = tmp_path / "cuda/bin/nvcc" if name == "nvcc" else programs / name
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
        where.chmod(0o755)
    named = ("CXX", "CUDA_PATH", "GROWKIT_FORCE_CUDA", "GROWKIT_SKIP_BUILD", "GROWKIT_SKIP_CUDA_BUILD")
    clean = dict.fromkeys((*named, "GROWKIT_LOCAL_VERSION"), "")
    clean |= {"CUDA_HOME": str(tmp_path / "cuda"), "PYTHONPATH": str(modules), "PATH": str(programs)}
    # What setup() was told, without building anything: the tag of the wheel follows from it.
    script = (
        "import setuptools, runpy, sys\n"
        "sys.argv = ['setup.py', '--name']\n"
        "setuptools.setup = lambda **told: print('modules:', [(m.name, m.sources) for m in told['ext_modules']])\n"
        "runpy.run_path('setup.py')\n"
    )
    output = run(bare_python, "-c", script, cwd=source, fails=built == "fails", **(clean | environment))
    assert said in output and (said or "growkit: no" not in output)
    if built != "fails":
        assert ("modules: [('growkit._C', ['csrc/bindings.cpp', 'csrc/cpu.cpp'" in output) == (built is not None)
        assert ("csrc/expand.cu" in output) == (built == "cuda")


def test_setup_refuses_a_wrong_arch_list(tmp_path):
    script = "import runpy, setuptools; setuptools.setup = lambda **_: 0; f = runpy.run_path('setup.py')['code_flags']"
    said = run(sys.executable, "-c", f"{script}; print(f('8.0;9.0a+PTX'))", cwd=ROOT, GROWKIT_SKIP_CUDA_BUILD="1")
    assert "arch=compute_80,code=sm_80" in said and "arch=compute_90a,code=compute_90a" in said
    for wrong in ("Hopper", ""):
        said = run(sys.executable, "-c", f"{script}; f({wrong!r})", cwd=ROOT, fails=True, GROWKIT_SKIP_CUDA_BUILD="1")
        assert f"TORCH_CUDA_ARCH_LIST: got {wrong!r}" in said


# --- the host half: launch plans ---


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ on PATH")
def test_index_arithmetic_on_the_host(tmp_path):
    flags = "-std=c++17 -O1 -Wall -Wextra -Werror -fsanitize=undefined -fno-sanitize-recover=all".split()
    run("g++", *flags, f"-I{SOURCE}", ROOT / "tests/launch_test.cpp", "-o", tmp_path / "launch_test", cwd=tmp_path)
    assert int(run(tmp_path / "launch_test", cwd=tmp_path).split()[0]) > 10_000_000


def build(compiled_once, source, *compilers, **environment):
    """setup.py's own build in a copy of the checkout: the library, and what the compilers said."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"GROWKIT_FORCE_CUDA": "", "GROWKIT_SKIP_BUILD": "", "MAX_JOBS": "1", "PATH": path} | environment

    def make(folder):
        said = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, **environment)
        (library,) = source.glob("growkit/_C*.so")
        shutil.copy(library, folder)
        (folder / "said.txt").write_text(said)

    kept = compiled_once(make, SOURCE, ROOT / "setup.py", environment, toolchain(*compilers))
    (library,) = kept.glob("_C*.so")
    return Path(shutil.copy(library, source / "growkit")), (kept / "said.txt").read_text()


@pytest.fixture(scope="module")
def built_for_cpu(compiled_once, tmp_path_factory):
    return build(compiled_once, checkout(tmp_path_factory.mktemp("cpu")), "g++", GROWKIT_SKIP_CUDA_BUILD="1")


@pytest.fixture(scope="module")
def built(compiled_once, tmp_path_factory):
    """The whole of it, for sm_80, sm_90, sm_100, beside whatever torch is here."""
    options = {"TORCH_CUDA_ARCH_LIST": "8.0;9.0;10.0", "NVCC_APPEND_FLAGS": "-Xptxas -v", "CUDA_HOME": str(nvcc_home())}
    options |= {"GROWKIT_FORCE_CUDA": "1", "GROWKIT_SKIP_CUDA_BUILD": ""}
    return build(compiled_once, checkout(tmp_path_factory.mktemp("cuda")), nvcc_home() / "bin/nvcc", "g++", **options)


@pytest.fixture(scope="module")
def plans(request):
    """growkit._C of this environment, else a build of it."""
    if cpu._C is not None:
        return cpu._C
    if lacking():
        pytest.skip(lacking())
    loader = importlib.machinery.ExtensionFileLoader("_C", str(request.getfixturevalue("built_for_cpu")[0]))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(module)
    return module


layers, sizes = st.integers(1, 40), st.integers(0, 70)


@settings(max_examples=100, deadline=None)
@given(
    layers_in=layers, layers_out=layers, rows=sizes, columns=sizes, transposed=st.booleans(), pad=st.integers(0, 5),
    misaligned=st.sampled_from((0, 4, 8)),
)  # fmt: skip
def test_mix_writes_every_element_once(plans, layers_in, layers_out, rows, columns, transposed, pad, misaligned):
    pitch = columns + pad
    problem = dict(
        layers_in=layers_in, layers_out=layers_out, rows=rows, columns=columns, misaligned=misaligned,
        x_strides=[rows * pitch, pitch, 1], y_strides=[1, rows + pad] if transposed else [pitch, 1],
    )  # fmt: skip
    plan = plans.mix_plan(**problem)
    assert 0 <= plan["grid"] < 2**31 and plan["block"] <= 1024 and plan["workspace"] == 0
    assert plan["shared_bytes"] <= 48 * 1024
    assert plan["deep"] or plan["layers"] >= layers_in
    assert plan["path"] != "vector" or misaligned == 0
    written = [offset for block in range(plan["grid"]) for offset in plans.mix_offsets(**problem, block=block)]
    r, c = problem["y_strides"]
    assert sorted(written) == sorted(i * r + j * c for i in range(rows) for j in range(columns))


@settings(max_examples=200, deadline=None)
@given(
    layers_in=st.integers(0, 64), layers_out=st.integers(0, 64), elements=st.integers(0, 2**40),
    size=st.sampled_from((2, 4)),
)  # fmt: skip
def test_mix_backward_stays_within_its_bounds(plans, layers_in, layers_out, elements, size):
    plan = plans.mix_backward_plan(layers_in, layers_out, elements, size)
    assert plan["shared_bytes"] <= 99 * 1024 and plan["block"] <= 384  # bytes: what every device since sm_80 has
    assert plan["grid"] <= 1056 * plan["sets"] and plan["tiles"] * plan["columns"] >= elements
    assert plan["workspace"] <= 4 * 1056 * layers_in * layers_out <= 64 << 20
    if layers_in and layers_out:
        assert plan["sets"] * plan["layers"][0] >= layers_in and plan["layers"][1] >= layers_out


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 2**12), k=st.integers(0, 2**14), m=st.integers(0, 2**12), flag=st.booleans(),
       element=st.sampled_from((1, 2, 4, 8)))  # fmt: skip
def test_gather_covers_its_result(plans, n, k, m, flag, element):
    gather = plans.gather_plan(n, k, m, element, flag)
    assert gather["unit"] == (16 if flag and m * element % 16 == 0 else element)
    thread = 4 * 16 * gather["unit"]  # bytes of its columns and rows
    assert gather["grid"] * gather["block"] * thread >= n * k * m * element
    if k >= 512 and m * element >= 4 * gather["unit"]:  # a warp's tile: at most half beyond the last row, and column
        assert (gather["grid"] - 1) * gather["block"] * thread < max(1, 4 * n * k * m * element)


def test_plans_refuse_nonsense(plans):
    with pytest.raises(ValueError, match="layers must be 0 to 64"):
        plans.mix_backward_plan(65, 1, 10, 4)
    with pytest.raises(ValueError, match="x_strides must be three"):
        plans.mix_plan(1, 1, 2, 2, [1], [1, 1])
    with pytest.raises(ValueError, match="must not be negative"):
        plans.gather_plan(-1, 2, 2, 4, True)


# --- the compiled half ---


def absolute_paths(library):
    """What in a library looks like a path of the building machine; /proc, /sys and /dev are CUDA's runtime's."""
    return re.findall(rb"(?<![\w./+-])/(?!(?:proc|sys|dev)/)(?:[\w.+-]+/)+[\w.+-]+", library.read_bytes())


@needs_compiler
def test_library_for_cpus_needs_no_torch_and_uses_its_threads(built_for_cpu):
    needed = re.findall(r"\(NEEDED\).*\[([^\]]+)\]", run("readelf", "-d", built_for_cpu[0], cwd=ROOT))
    assert needed and not any("torch" in name or "c10" in name for name in needed)
    assert not absolute_paths(built_for_cpu[0])
    script = LOAD + "facts = _C.build_info(); print(facts.pop('compiler') != '', facts)"
    for before, threads in (("", False), ("import torch", True)):
        said = run(sys.executable, "-c", before + script, built_for_cpu[0], cwd=ROOT)
        assert said == f"True {{'torch_threads': {threads}, 'kernels': False}}\n"


@needs_nvcc
def test_kernels_compile_without_spills(built):
    report = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'\n(.*?)Used (\d+) registers", built[1], re.DOTALL
    )
    kernels = {re.search(r"(mix_backward|mix|gather|sum_partials)_kernel", name)[0] for name, *_ in report}
    assert kernels == {"mix_kernel", "mix_backward_kernel", "gather_kernel", "sum_partials_kernel"}
    assert {arch for _, arch, *_ in report} == {"sm_80", "sm_90", "sm_100"}
    assert len(report) == 3 * (5 + 3 + 5 + 1)
    for name, arch, body, registers in report:
        assert STACK.search(body).groups() == ("0", "0", "0"), f"{name} on {arch} spills: {body}"
        assert int(registers) <= 255


@needs_nvcc
def test_library_needs_torch_and_not_the_cuda_runtime(built):
    text = run("readelf", "-d", built[0], cwd=ROOT)
    needed = set(re.findall(r"\(NEEDED\)\s+Shared library: \[([^\]]+)\]", text))
    # libtorch.so brings libtorch_cuda.so where there is one, which the weak stream function is then found in.
    assert "libtorch.so" in needed
    assert not any("cudart" in name or "torch_cuda" in name or "torch_python" in name for name in needed)
    symbols = run("nm", "-D", built[0], cwd=ROOT)
    assert re.search(r"^\s+w aoti_torch_get_current_cuda_stream$", symbols, re.MULTILINE)
    assert not re.search(r" T cuda", symbols)  # the static runtime is nobody else's
    assert not absolute_paths(built[0])


@needs_nvcc
def test_library_loads_and_knows_its_build(built):
    script = (
        "import torch" + LOAD + "facts = _C.build_info()\n"
        "assert facts['kernels'] and facts['archs'] == ['8.0', '9.0', '10.0'] and facts['torch'] == '2.10', facts\n"
        "assert facts['stream_found'] == (torch.version.cuda is not None), facts\n"
        "assert torch._C._dispatch_has_kernel_for_dispatch_key('growkit::kron_mix_', 'CUDA')\n"
        "import growkit.ops\n"
        "x = torch.ones(2, 3, 4)\n"
        "out = torch.empty(2, 3, 4)\n"
        "torch.ops.growkit.kron_mix_([out], [x], [torch.eye(2)], [x.new_empty(0)] * 2)\n"
        "assert out.equal(x)  # CPU tensors still go to the reference\n"
        "cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)\n"
        "try:  # what a CUDA tensor would meet\n"
        "    torch.ops.growkit.kron_mix_.default.redispatch(cuda, [out], [x], [torch.eye(2)], [x.new_empty(0)] * 2)\n"
        "    raise SystemExit('a kernel took CPU tensors')\n"
        "except RuntimeError as error:\n"
        "    missing = torch.version.cuda is None\n"
        '    assert ("kron_mix_: torch\'s CUDA library was not found" in str(error)) == missing, error\n'
    )
    run(sys.executable, "-c", script, built[0], cwd=built[0].parents[1])
