"""A Mixture-of-Experts layer as one persistent Triton launch.

    from megakernel import Experts, Router, moe
    out = moe(x_TH, router_weight_EH, Experts(gate_up_E2IH, down_EHI), Router(top_k=8))

Letters and words are those of ``reference``'s glossary. On a machine without a GPU set
``TRITON_INTERPRET=1`` before importing, and the same kernel runs in Triton's interpreter.
"""

from megakernel.api import MoEOutput, moe, moe_routed, prepare_replay
from megakernel.config import KernelConfig
from megakernel.errors import MegakernelStall
from megakernel.experts import Experts, MainGrad, SharedExpert
from megakernel.launch.workspace import check, release_workspaces
from megakernel.placement import Placement
from megakernel.replay import Replay
from megakernel.router import Router

__all__ = [
    "Experts",
    "KernelConfig",
    "MainGrad",
    "MegakernelStall",
    "MoEOutput",
    "Placement",
    "Replay",
    "Router",
    "SharedExpert",
    "check",
    "moe",
    "moe_routed",
    "prepare_replay",
    "release_workspaces",
]


def __getattr__(name: str) -> str:
    """Return ``__version__``, asked of the installed distribution only when somebody asks."""
    if name == "__version__":
        from importlib.metadata import version

        return version("moe-megakernel")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
