"""The planner's chapters, one file each; no name here is public."""
