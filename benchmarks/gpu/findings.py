"""What a part has found: written to its file after every entry, so that nothing is lost with its process."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"


@dataclass
class Findings:
    """checks: (name, whether it holds, what was found). figures: measurements without a verdict. skipped: what this
    device or installation cannot do, and what it would need."""

    file: Path | None = None
    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    headline: str = ""

    def say(self, headline: str) -> None:
        """What the part has found, in a few words."""
        self.headline = headline
        self._write()

    def check(self, name: str, holds: bool, found: Any = "") -> None:
        self.checks.append((name, bool(holds), rounded(found)))
        self._write()

    def figure(self, name: str, value: Any) -> None:
        self.figures[name] = rounded(value)
        self._write()

    def skip(self, name: str, reason: str) -> None:
        self.skipped[name] = reason
        self._write()

    def fail(self, error: str) -> None:
        self.error = f"{self.error}; {error}" if self.error else error
        self._write()

    @classmethod
    def read(cls, file: Path) -> "Findings":
        return cls(**json.loads(file.read_text())) if file.exists() else cls()

    @property
    def status(self) -> str:
        if self.error or not all(holds for _, holds, _ in self.checks):
            return FAILED
        return PASSED if self.checks or self.figures else SKIPPED

    def line(self) -> str:
        """The part in one line: what went wrong, or else how much holds, and what was said."""
        wrong = [f"{name}: {found}" for name, holds, found in self.checks if not holds]
        if self.error or wrong:
            return "; ".join([*([self.error] if self.error else []), *wrong])[:300]
        if self.status == SKIPPED:
            return "; ".join(self.skipped.values())
        held = f"{len(self.checks)} checks hold" if self.checks else ""
        return "; ".join(filter(None, [self.headline, held]))

    def _write(self) -> None:
        if self.file is not None:
            self.file.write_text(json.dumps({name: value for name, value in asdict(self).items() if name != "file"}))


def rounded(value: Any) -> Any:
    """The value with its floats cut to four significant digits, at any depth."""
    if isinstance(value, dict):
        return {str(name): rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value
