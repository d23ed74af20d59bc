"""Benchmarks of the library beside others, a script a question."""
