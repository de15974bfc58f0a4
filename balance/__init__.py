"""The replay planner."""
