"""Statistics of a data set: lengths of its rows, effects of the limits, duplicate prompts."""

from dataclasses import dataclass, field
from hashlib import blake2b

import numpy

from sdft_ds.preview.row import Look

PERCENTILES = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
# How a row over a limit is handled.
CUT_QUESTION = "lose the beginning of the question"
CUT_CONTEXT = "lose the end of the context"
DROPPED = "are dropped"
REFUSED = "stop the training"


@dataclass
class Statistics:
    """truncation: the setting. lengths: tokens before truncation. fates: how rows over a limit are handled -> their
    indices. duplicates: {row: the first row with the same student prompt}."""

    truncation: str
    rows: int = 0
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"student": [], "teacher": [], "context": []})
    fates: dict[str, list[int]] = field(
        default_factory=lambda: {name: [] for name in (CUT_QUESTION, CUT_CONTEXT, DROPPED, REFUSED)}
    )
    duplicates: dict[int, int] = field(default_factory=dict)
    _first: dict[bytes, int] = field(default_factory=dict)  # digest of a student's prompt -> its first row

    def add(self, look: Look) -> None:
        self.rows += 1
        lengths = (len(look.uncut.student.ids), len(look.uncut.teacher.ids), look.context_tokens)
        for known, length in zip(self.lengths.values(), lengths, strict=True):
            known.append(length)
        if look.refusal:
            self.fates[DROPPED if self.truncation == "drop" else REFUSED].append(look.index)
        if look.cut_question:
            self.fates[CUT_QUESTION].append(look.index)
        if look.cut_context:
            self.fates[CUT_CONTEXT].append(look.index)
        digest = blake2b(look.uncut.student.text.encode(), digest_size=16).digest()
        first = self._first.setdefault(digest, look.index)
        if first != look.index:
            self.duplicates[look.index] = first

    def percentiles(self, what: str) -> list[int]:
        """The length at each of PERCENTILES, always that of an actual row."""
        return numpy.percentile(self.lengths[what], [*PERCENTILES.values()], method="inverted_cdf").tolist()
