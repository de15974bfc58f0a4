"""The layer as one persistent Triton launch."""
