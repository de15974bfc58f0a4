"""The kernel weakened on purpose, as the check of the race check."""
