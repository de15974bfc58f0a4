"""List the suites, models, scenarios and providers, and what can run here."""

import argparse

import torch

from perf.problems.cases import SCENARIOS, SHAPES
from perf.problems.peers import ALL_PROVIDERS
from perf.suites.command import SUITES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing to choose."""


def run(arguments: argparse.Namespace) -> int:
    """Print what there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("suites")
    for name, suite in SUITES.items():
        print(
            f"  {name:10} {suite.about}; {'needs a GPU' if suite.needs_gpu else 'runs anywhere'}"
        )
    print("models")
    for shape in SHAPES.values():
        print(
            f"  {shape.name:20} E {shape.num_experts:>3}  K {shape.top_k}  "
            f"H {shape.hidden}  I {shape.intermediate}"
        )
    print("scenarios")
    for name, make in SCENARIOS.items():
        print(f"  {name:14} {(make.__doc__ or '').splitlines()[0]}")
    print("providers")
    for provider in ALL_PROVIDERS:
        reason = provider.why_missing(device)
        print(f"  {provider.name:24} {f'skipped: {reason}' if reason else 'ready'}")
    return 0
