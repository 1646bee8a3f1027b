"""heliostat: distributed scale-out training on Ray. See README.md for the tour and `heliostat --help` for the commands."""

__version__ = "0.1.0"
