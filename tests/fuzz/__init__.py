"""Random calls of everything public, run long by ``python -m tests.fuzz``."""
