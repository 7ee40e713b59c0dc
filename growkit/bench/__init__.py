"""Benchmarks that ship with the package: workloads, what growkit is compared with, and timing in pairs."""
