"""Preview of a data set as training would see it: prompts, truncation, loss tokens, divergence from the teacher."""

from sdft_ds.preview.notebook import inline

__all__ = ["inline"]
