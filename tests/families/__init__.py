"""Every text-generating family of the installed transformers, tiny, on the 8-bit cache."""
