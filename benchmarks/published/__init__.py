"""The suite of published sizes on a GPU, behind `benchmarks/attention.py`. Reading order: the README."""
