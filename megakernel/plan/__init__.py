"""What host and device both read: sizes, records, and the order of the tasks. No loads, no tensors made."""
