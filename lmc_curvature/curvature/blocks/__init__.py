"""Dense blocks of the Hessian."""
