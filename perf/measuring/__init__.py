"""How a thing is timed, and what it could reach."""
