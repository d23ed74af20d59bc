"""A script a question: what is measured, beside whom, and how fast."""
