"""The version, which the compiled extension must have, too."""

__all__ = ["__version__"]

__version__ = "0.1.0"
