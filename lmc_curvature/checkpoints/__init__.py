"""Reading and writing checkpoints, without running code."""
