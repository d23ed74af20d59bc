"""Matrices over the data."""
