"""Pictures of barriers and landscapes, a function a figure."""
