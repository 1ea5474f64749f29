"""The benchmarks: ``python -m bertops bench`` runs them all, ``pytest bench/bench_attention.py`` one of them."""
