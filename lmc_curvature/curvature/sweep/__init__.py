"""k tangents and one adjoint."""
