"""The run on a GPU: is it right, how fast is it, with hard limits and one archive at the end."""
