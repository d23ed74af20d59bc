"""The curvature engine: exact derivatives of an objective, and nothing of barriers."""
