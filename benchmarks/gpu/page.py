"""The page of a run, in Markdown: a line for each part, and below what each has found."""

from typing import Any

MARKS = {True: "yes", False: "**NO**"}


def render(results: dict[str, Any]) -> str:
    about = {name: value for name, value in results.items() if name != "parts"}
    lines = ["# sdft_ds on this device", "", ", ".join(f"{name}: {value}" for name, value in about.items()), ""]
    lines += ["| part | status | s | in short |", "|---|---|---|---|"]
    for part in results["parts"]:
        lines.append(f"| {part['part']} | {part['status']} | {part['seconds']} | {_cell(part['line'])} |")
    for part in results["parts"]:
        if "checks" in part:
            lines += _section(part)
    return "\n".join(lines) + "\n"


def _section(part: dict[str, Any]) -> list[str]:
    lines = ["", f"## {part['part']}", ""]
    if part["error"]:
        lines += [f"Error: {part['error']}", ""]
    if part["checks"]:
        lines += ["| must hold | holds | found |", "|---|---|---|"]
        lines += [f"| {_cell(name)} | {MARKS[holds]} | {_cell(found)} |" for name, holds, found in part["checks"]]
        lines.append("")
    for name, value in part["figures"].items():
        lines += _table(name, value)
    lines += [f"- {name}: skipped, {reason}" for name, reason in part["skipped"].items()]
    return lines


def _table(name: str, value: Any) -> list[str]:
    """A figure in a line, or a dictionary of dictionaries as a table."""
    if not (isinstance(value, dict) and value and all(isinstance(each, dict) for each in value.values())):
        return [f"- {name}: {_text(value)}"]
    columns = list(dict.fromkeys(column for each in value.values() for column in each))
    rows = [[row, *(_cell(each.get(column, "")) for column in columns)] for row, each in value.items()]
    lines = ["", f"{name}:", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    return " / ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _cell(value: Any) -> str:
    return _text(value).replace("|", "/").replace("\n", " ")
