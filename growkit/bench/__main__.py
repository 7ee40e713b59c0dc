"""What growkit is compared with, and how: the official op sequence of Sophia, and timing in pairs.

    python -m growkit.bench

prints the CPU step against the official one, on one thread, after checking that both give the same bits. Much of the
official time is page faults on fresh temporaries: MALLOC_TOP_PAD_=1000000000 MALLOC_MMAP_THRESHOLD_=4000000000
MALLOC_TRIM_THRESHOLD_=4000000000 in the environment make glibc keep freed pages, and leave the arithmetic.
"""

import platform

import torch

from growkit.bench import sophia


def main():
    torch.set_num_threads(1)
    shapes = sophia.gpt2_shapes()
    count = sum(torch.Size(shape).numel() for shape in shapes)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, 1 thread, process CPU time")
    print(f"{len(shapes)} float32 tensors, {count / 1e6:.1f}M elements")
    r = sophia.cpu_step(shapes)
    print(f"official {r['a'] * 1e3:.1f} ms, growkit {r['b'] * 1e3:.1f} ms, ratio {r['ratio']:.2f}, same bits")
    print(f"noise of the ratio: {r['noise']:.2f} (growkit against itself)")


if __name__ == "__main__":
    main()
