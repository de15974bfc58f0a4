"""A small language model from rollout to replayed forward."""
