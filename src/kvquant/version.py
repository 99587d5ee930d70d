"""The version: the build reads it here, and an extension of another one is not used."""

__all__ = ["__version__"]

__version__ = "0.1.0"
