"""Spectra of symmetric operators."""
