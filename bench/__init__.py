"""The benchmarks: ``python -m bertops bench`` runs all, ``pytest bench/bench_attention.py`` one op's."""
