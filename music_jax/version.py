"""Version of the package, which runs and exports record."""

__version__ = "0.1.0"
