"""What a plan is worth: load, traffic, legality."""
