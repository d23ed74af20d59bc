"""What is asked of the engine, and what it answers for a batch."""

import numpy as np
from jaxtyping import Float

BatchValues = tuple[float, Float[np.ndarray, " k"], Float[np.ndarray, "k k"]]
"""Loss, slopes and curvature of one batch."""
