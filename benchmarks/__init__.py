"""How fast aiosync is beside its peers: `python -m benchmarks`, from the root of the repository.

What must live here: nothing. Arguments are in `__main__`, the method is in `runner`, what is
measured is in `suites`, what is demanded is in `targets`.
"""
