"""What host and device both read: sizes, records, the order of the tasks; no loads."""
