"""Benchmarks that ship with the package: the goals, workloads and baselines, timing in pairs, and the table of both.

`table` holds the goals and runs them; `sophia`, `expansion`, `ceilings` and `instructions` are the workloads;
`measure` is how they are timed; `scale` is arithmetic about models too large to run.
"""
