"""The look of figures and of summaries: styles, axes, scales and texts."""
