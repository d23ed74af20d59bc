"""The look of all figures: styles, axes, scales and texts."""
