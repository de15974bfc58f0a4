"""Mathematics that is proved, without the planner's words."""
