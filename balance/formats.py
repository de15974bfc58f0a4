"""The door to recorded routing: every reader by name, whatever file below holds it.

    from balance import formats

    recorded = formats.read("rollout.jsonl", num_experts=128)   # a Trace, or Routes to be packed
    routes = formats.from_vllm(responses, num_experts=128)      # what an engine returned just now
    trace = routes.pack(num_ranks=8)

The readers live in ``balance.recorded``: ``read`` detects, ``engines`` and ``trainers`` decode,
``files`` reads plain files, ``routes`` is what all of them end in.
"""

from balance.recorded import FORMATS
from balance.recorded.engines import decode_sglang, decode_vllm, from_sglang, from_vllm
from balance.recorded.files import read_fingerprints, read_npz, write_npz
from balance.recorded.read import detect, read
from balance.recorded.routes import Routes, join
from balance.recorded.trainers import from_megatron, from_slime, from_verl

__all__ = [
    "FORMATS",
    "Routes",
    "decode_sglang",
    "decode_vllm",
    "detect",
    "from_megatron",
    "from_sglang",
    "from_slime",
    "from_verl",
    "from_vllm",
    "join",
    "read",
    "read_fingerprints",
    "read_npz",
    "write_npz",
]
