"""Where traces come from: recordings of engines and trainers, packing, synthetic routing."""

# What ``balance.recorded.read`` reads; here, where naming them imports nothing.
FORMATS = ("trace", "npz", "sglang", "vllm", "verl", "slime", "megatron", "fingerprint")
