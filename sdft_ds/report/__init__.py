"""Self-contained HTML report of a run, read from its output_dir."""

from sdft_ds.report.run_page import inline, write

__all__ = ["inline", "write"]
