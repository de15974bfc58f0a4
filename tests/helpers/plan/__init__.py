"""Task lists: of specs, of the Python machine, of the kernel; and backward calls of dialects."""
