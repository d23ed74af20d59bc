"""Products of one batch."""
