"""UᵀHU, by the sweep and by products."""
