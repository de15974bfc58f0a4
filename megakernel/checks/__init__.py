"""The one home of refusals: argument, rule, value, before any launch."""
