"""Benchmarks: one program a file, each with a question; `experiments/README.md` lists them with their reports."""
