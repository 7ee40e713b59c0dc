#!/usr/bin/env bash
# A CUDA toolkit in /opt/cuda inside a manylinux_2_28 container. Usage: toolkit.sh 13.0 | toolkit.sh 12.9
set -euo pipefail
case "$1" in
13.*)
    # NVIDIA's packages on PyPI. All of one release: a newer nvvm or crt than nvcc makes ptxas refuse its input.
    /opt/python/cp312-cp312/bin/python -m pip install --target /opt/nvidia \
        "nvidia-cuda-nvcc==$1.*" "nvidia-nvvm==$1.*" "nvidia-cuda-crt==$1.*" "nvidia-cuda-cccl==$1.*" \
        "nvidia-cuda-runtime==$1.*"
    ln -sfn "/opt/nvidia/nvidia/cu${1%%.*}" /opt/cuda
    ;;
12.*)
    # PyPI's nvidia-cuda-nvcc-cu12 has ptxas but no nvcc, so these come from NVIDIA's repository.
    dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
    dnf install -y "cuda-nvcc-${1/./-}" "cuda-cudart-devel-${1/./-}"
    ln -sfn "/usr/local/cuda-$1" /opt/cuda
    ;;
*)
    echo "toolkit.sh: got '$1', expected 12.x or 13.x" >&2
    exit 2
    ;;
esac
/opt/cuda/bin/nvcc --version
