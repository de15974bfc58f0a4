"""The layer under the race check: its launches, and all that the check knows of its kernel."""
