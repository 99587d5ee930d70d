"""Programs that measure kvquant beside its peers; `python -m benchmarks --help`."""
