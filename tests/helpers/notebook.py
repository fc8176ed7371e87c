"""Executes a notebook's code cells in order, in this process, and keeps what they show. No Jupyter is needed.

python -m tests.helpers.notebook docs/tour.ipynb      executes it in its folder and writes the outputs into it
"""

import ast
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook: dict[str, Any]) -> None:
    """Sets the outputs of the code cells: what they print, and the value of a last line that is an expression."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), 1):
        said = {"stdout": io.StringIO(), "stderr": io.StringIO()}
        with contextlib.redirect_stdout(said["stdout"]), contextlib.redirect_stderr(said["stderr"]):
            source = "".join(cell["source"])
            value = _value(ast.parse(source), f"cell {number}", names)
        cell["execution_count"] = number
        cell["outputs"] = [
            {"name": name, "output_type": "stream", "text": _lines(_on_screen(text.getvalue()))}
            for name, text in said.items()
            if text.getvalue().strip()
        ]
        if value is not None and not source.endswith(";"):
            data = {"text/plain": _lines(repr(value))}
            if hasattr(value, "_repr_html_"):
                data["text/html"] = _lines(value._repr_html_())
            cell["outputs"].append(
                {"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"}
            )


def _value(tree: ast.Module, name: str, names: dict[str, Any]) -> Any:
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), names)


def _on_screen(text: str) -> str:
    """What is left of lines that were written over, as progress bars are."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    file = Path(sys.argv[1]).resolve()
    os.chdir(file.parent)
    executed = read(file)
    execute(executed)
    file.write_text(json.dumps(executed, indent=1, ensure_ascii=False) + "\n", "utf-8")
