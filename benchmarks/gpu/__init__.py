"""The first run on a GPU: `python -m benchmarks.gpu`; see __main__."""
