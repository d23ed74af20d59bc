"""Barriers between networks: predicted from curvature at the ends, and measured in between."""
