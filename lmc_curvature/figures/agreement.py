"""How well predicted barriers agree with measured ones, over forks and over layers."""

import warnings
