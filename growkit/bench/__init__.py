"""Benchmarks that ship with the package: the goals, workloads and baselines, timing in pairs, and the table of both.

`table` holds the goals and runs them. The workloads are `sophia`, `sophia8bit`, `sampled_nll` and `kron`, named as the
operators that they time, `ceilings` and `instructions`; `measure` is how they are timed. `pairs` and `scale` are
arithmetic about growths and about models too large to run.
"""
