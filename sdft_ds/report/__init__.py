"""A run as one HTML page that needs nothing but itself, read from what the run left beside its weights."""

from sdft_ds.report.run_page import write

__all__ = ["write"]
