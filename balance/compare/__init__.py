"""Plans beside published baselines: tables, pictures."""
