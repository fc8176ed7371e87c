"""The table in tests/README.md names tests that exist, at least one for each of its rows."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
ROWS = [line.split("|")[1:-1] for line in (FOLDER / "README.md").read_text().splitlines() if re.match(r"\| \d", line)]


def test_every_row_names_a_test_that_exists():
    assert [int(row[0]) for row in ROWS] == list(range(1, 70))
    for row in ROWS:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[3])
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (FOLDER / file).read_text(), (file, name)
