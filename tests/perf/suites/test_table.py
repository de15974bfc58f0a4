"""Every suite of the table finds its function, and only when it runs."""

from importlib import import_module

from perf.suites import table
from perf.suites.table import SUITES


def test_every_suite_finds_its_function(monkeypatch):
    called = []

    class Module:
        def __init__(self, name):
            self.module = import_module(name)

        def __getattr__(self, name):
            assert callable(getattr(self.module, name))
            return lambda bench: called.append((name, bench))

    monkeypatch.setattr(table, "import_module", Module)
    for name, suite in SUITES.items():
        suite.run(name)
    assert called == [(name, name) for name in SUITES]
