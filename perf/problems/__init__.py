"""What is measured, and by whom."""
