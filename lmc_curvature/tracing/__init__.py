"""What is computed between siblings, as tables."""
