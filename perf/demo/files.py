"""Where the demo's own files are: the weights, their description, and what the model routed."""

from pathlib import Path

DATA = Path(__file__).parent / "data"
WEIGHTS = "demo.safetensors"
CARD = "demo.json"
ROUTING = "routing.npz"
