"""The modes of transformers' generation on the 8-bit cache."""
