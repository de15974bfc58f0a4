"""A small language model from rollout to a training step under replay."""
