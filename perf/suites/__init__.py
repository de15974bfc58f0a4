"""The suites of ``python -m perf run``."""
