"""Measured rows: written, read, compared and drawn."""
