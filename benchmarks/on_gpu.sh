#!/usr/bin/env bash
# All that needs a GPU, in under 9 minutes, with no network, the most valuable part first.
#   benchmarks/on_gpu.sh [--dry-run] [FOLDER [PART ...]]
# FOLDER (default benchmarks/results/<hardware>) gets at most 8 files. PART: those to run (default all but tune and
# evidence). Each has a limit of time and writes as it goes, so one that is cut short keeps what it has. Exit code 1 if a
# part failed or was cut short. PYTHON= picks the interpreter: it needs torch with CUDA, triton, transformers, pytest,
# pytest-benchmark, and for the extension nvcc, ninja, pybind11, setuptools.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
dry=
[ "${1:-}" = --dry-run ] && { dry=yes; shift; }

# name, expected minutes (of one H200), limit in seconds, what
parts='install|0.5|50|build and install, versions, nvidia-smi
tests|2.0|130|pytest tests -m gpu, then the tests of the kernels on the GPU
sanitizer|0.0|130|beside them: compute-sanitizer memcheck, racecheck, initcheck on small shapes
pretrain|2.3|165|examples/pretrain.py at 30 M parameters, 8 runs side by side
sophia|1.8|125|ceilings, S1 to S11, N1, N2
expansion|0.9|65|L1 to L7'
more='tune|0.7|70|what is still to be decided by time: benchmarks/tune.py
evidence|2.8|190|benchmarks.evidence thirty, thirty_growth: the runs that docs/results lacks, as far as time goes'

if [ -n "$dry" ]; then
    printf '%-10s %8s %8s  %s\n' part minutes 'at most' what
    while IFS='|' read -r name minutes limit what; do
        printf '%-10s %8s %6s s  %s\n' "$name" "$minutes" "$limit" "$what"
    done <<<"$parts"$'\n'"$more"
    awk -F'|' '{ m += $2; s += $2 ? $3 : 0 } END { printf "%-10s %8.1f %6d s\n", "all", m, s }' <<<"$parts"
    exit 0
fi

install() {
    "$python" -c 'import sys, torch, triton; print("python", sys.version.split()[0], "torch", torch.__version__,
        "triton", triton.__version__, "cuda", torch.version.cuda)'
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv
    nvcc --version | tail -n 1
    git log -1 --format='commit %h' 2>/dev/null
    capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    TORCH_CUDA_ARCH_LIST=$capability "$python" -m pip install --quiet --no-deps --no-build-isolation -e . || return 1
    (cd / && "$python" -c 'import growkit; from growkit.kron import expand; print(growkit.__version__, expand.extension)')
}

# The files by name: others import what the test machine has and a bare GPU machine may lack, and one such file would
# keep pytest from running any. Several workers, where pytest-xdist is: most of the time goes into compiling.
tests() {
    local workers=
    "$python" -c 'import xdist' 2>/dev/null && workers="-n $(($(nproc) < 10 ? $(nproc) : 10)) --dist loadgroup"
    "$python" -m pytest $(grep -l "mark.gpu" tests/*/test_*.py) -q -m gpu --durations 5 $workers
    local gpu=$?
    # Those that take whatever device there is.
    "$python" -m pytest tests/ops/test_*_kernel.py tests/ops/test_{random,sophia8bit}.py tests/optim/test_on_kernels.py \
        -q -m "not gpu" --durations 5 $workers
    local kernels=$?
    return $((gpu || kernels))
}

bench() { # file, ids
    local file=$1
    shift
    # What growkit bench runs, without the packages of the command.
    "$python" -c 'import sys; from growkit.bench import table; sys.exit(table.run(sys.argv[2:], "cuda", sys.argv[1]))' \
        "$folder/$file" "$@"
}

sophia() { bench sophia.json copy fill mm bmm S1 S4 S2 S5 S6 S7 S8 S9 S10.host S10.graph S10.temporaries S11 N1 S3 N2; }

expansion() { bench expansion.json L1 L3.gpt2-medium L2.gpt2-medium L5 L6 L3 L4.literal L2 L7 L4; }

pretrain() { OMP_NUM_THREADS=1 "$python" -m benchmarks.evidence.sweep "$folder/pretrain.jsonl"; }

evidence() {
    local data i
    data=$(mktemp -d)
    cp docs/results/data/*.json "$data"
    for i in 1 2 3; do # side by side: what one does on the CPU hides behind another's kernels
        "$python" -m benchmarks.evidence thirty thirty_growth --out "$data" --seconds 150 &
    done
    wait
    cp "$data"/thirty*.json "$folder"
}

tune() { "$python" benchmarks/tune.py "$folder/tune.jsonl"; }

# Small shapes through every kernel, each call checked in float64: every other workload, from the first or the second.
small='
import sys
from growkit.bench import table
for name, workload in list(table.WORKLOADS.items())[int(sys.argv[1]) :: 2]:
    if workload.needs == "cuda" and not name.startswith("memory"):
        workload.build(device="cuda", tiny=True).check()
        print(name, "checked", flush=True)
'

sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed: skipped"; return 0; }
    local bad=0 tool half log
    for tool in memcheck racecheck initcheck; do
        for half in 0 1; do
            {
                log=$folder/$tool-$half.log
                PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                    "$python" -c "$small" "$half" >"$log" 2>&1
                echo "exit code $?" >>"$log"
            } &
        done
    done
    wait
    for log in "$folder"/*check-?.log; do
        tool=$(basename "$log" .log)
        case $(tail -n 1 "$log"):$(<"$log") in
            "exit code 0:"*) echo "$tool: no errors, workloads checked: $(grep -c ' checked$' "$log")" ;;
            "exit code 9:"*"SUMMARY: "*)
                echo "$tool: ERRORS, by how often"
                # Which error, and the first line of Python above it.
                grep -oE "(Uninit|Invalid|Race|Potential|Warn|Error)[^.]* (access|read|write|hazard)[a-z ]*|(in|at) [a-z_0-9]+\.py:[0-9]+" \
                    "$log" | sed 's/0x[0-9a-f]*//g' | sort | uniq -c | sort -rn | head -n 20
                tail -n 40 "$log"
                bad=1
                ;;
            "exit code 124:"*) echo "$tool: cut short after 120 s, so not finished"; tail -n 5 "$log" ;;
            *) echo "$tool: this machine refuses it, skipped:"; tail -n 5 "$log" ;;
        esac
        rm "$log"
    done
    return $bad
}

run() { # name, limit, what
    local start=$SECONDS code
    echo "== $1: $3"
    # A function cannot be given to timeout: this script again, told which part.
    ON_GPU_PART=$1 ON_GPU_FOLDER=$folder timeout --kill-after=5 "$2" "$BASH" "$0" >"$folder/$1.txt" 2>&1
    code=$?
    tail -n 3 "$folder/$1.txt"
    case $code in
        0) echo "== $1: done in $((SECONDS - start)) s" ;;
        124 | 137) echo "== $1: cut short after $2 s; what it wrote is kept" ;;
        *) echo "== $1: FAILED with exit code $code" ;;
    esac
    return $code
}

if [ -n "${ON_GPU_PART:-}" ]; then
    folder=$ON_GPU_FOLDER
    "$ON_GPU_PART"
    exit
fi

"$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null ||
    { echo "$python sees no CUDA device: nothing to run here" >&2; exit 1; }

folder=${1:-}
if [ -z "$folder" ]; then
    gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z' 'a-z' | tr -cs 'a-z0-9\n' -)
    folder=benchmarks/results/$gpu
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
shift $(($# > 0))
if [ $# -gt 0 ]; then
    parts=$(for name; do grep "^$name|" <<<"$parts"$'\n'"$more" || { echo "no part $name, see --dry-run" >&2; exit 1; }; done) ||
        exit 1
fi
failed=0 beside=
finish() {
    [ -z "$beside" ] || wait "$beside" || failed=1
    beside=
}
while IFS='|' read -r name _ limit what; do
    [ "$name" = sanitizer ] || finish
    if [ "$name" = tests ]; then
        run "$name" "$limit" "$what" </dev/null &
        beside=$!
    else
        run "$name" "$limit" "$what" </dev/null || failed=1
    fi
done <<<"$parts"
finish
# Two files of text are enough: the tables are in sophia.txt and expansion.txt, what passed in tests.txt.
if [ -f "$folder/install.txt" ] && [ -f "$folder/tests.txt" ]; then
    cat "$folder/install.txt" "$folder/tests.txt" >"$folder/tests.txt.part" && mv "$folder/tests.txt.part" "$folder/tests.txt"
    rm "$folder/install.txt"
fi
ls -l "$folder"
exit $failed
