"""How fast aiosync is beside its peers: `python -m benchmarks`, from the root of the repository.

What must live here: nothing. Arguments are in `__main__`, the method is in `runner`, the
measurements are in `suites`, the targets in `targets`.
"""
