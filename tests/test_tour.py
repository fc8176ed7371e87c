"""docs/tour.ipynb: it runs from top to bottom, and holds what it showed when it ran."""

import ast
import base64
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import notebook

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"
MACHINE = re.compile(r"(?<![\w.:/-])/(?!/)(?:[\w.-]+/)+[\w.-]+|[A-Z]:\\")
LINKS = re.compile(r"\]\((?!http)([^)#]+)")


def test_it_was_run_in_order_without_an_error_and_shows_no_machine():
    cells = notebook.code_cells(notebook.read(TOUR))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    text = "".join(part for output in outputs for part in output.get("text", []))
    shown = ["".join(part) for output in outputs for part in output.get("data", {}).values()]
    pages = [base64.b64decode(page).decode() for part in shown for page in re.findall("base64,([^\"']+)", part)]
    assert len(pages) == 2 and "This teacher" in pages[0] and "Before and after" in pages[1]
    told = re.sub("<style>.*?</style>|<script>.*?</script>|<[^>]+>", " ", "\n".join(pages), flags=re.DOTALL)
    for found in (text, told):
        assert not MACHINE.findall(found) and "Traceback" not in found and "Warning" not in found
    # What a reader sees where no HTML is shown.
    assert re.search(r"\nSDFT +1\.00 +1\.00 +0\.00", text) and re.search(r"\nSFT +[\d.]+ +0\.", text)


def test_its_links_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in notebook.read(TOUR)["cells"])
    assert all((TOUR.parent / link).exists() for link in LINKS.findall(text)) and LINKS.search(text)


def test_what_it_imports_and_calls_exists():
    """Without running it: names, methods, and the names of arguments."""
    cells = notebook.code_cells(notebook.read(TOUR))
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                exec(f"from {node.module} import {alias.name}", known)
    made = {  # variable -> its class
        node.targets[0].id: known[node.value.func.id]
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and inspect.isclass(known.get(getattr(node.value.func, "id", None)))
    }
    assert {"trainer", "baseline", "args"} <= made.keys()
    calls = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in known:
            assert hasattr(known[node.value.id], node.attr), ast.unparse(node)
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name):
            function = known.get(called.id)
        elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            function = getattr({**known, **made}.get(called.value.id), called.attr, None)
            assert function is not None or called.value.id not in {**known, **made}, ast.unparse(node)
        else:
            continue
        parameters = inspect.signature(function).parameters if function else {}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            assert not function or {each.arg for each in node.keywords} - {None} <= parameters.keys(), ast.unparse(
                node
            )
            calls += function is not None
    assert calls > 5


def test_a_cell_shows_what_it_prints_and_its_last_value():
    cells = [
        {"cell_type": "code", "source": text.splitlines(keepends=True)}
        for text in ("import sys\nx = 2\nprint(x)", "x + 1", "x;", "print('10 %\\r20 %', file=sys.stderr)")
    ]
    notebook.execute({"cells": [*cells, {"cell_type": "markdown", "source": ["x"]}]})
    printed, value, quiet, bar = (cell["outputs"] for cell in cells)
    assert printed == [{"name": "stdout", "output_type": "stream", "text": ["2\n"]}] and quiet == []
    assert value[0]["data"] == {"text/plain": ["3"]} and value[0]["execution_count"] == 2
    assert bar[0]["text"] == ["20 %\n"]


@pytest.mark.full
def test_it_runs_from_top_to_bottom(tmp_path):
    """In docs/ of a clone, by the program that writes its outputs."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "sdft_ds").symlink_to(ROOT / "sdft_ds")
    mine = shutil.copy(TOUR, tmp_path / "docs")
    subprocess.run([sys.executable, "-m", "tests.helpers.notebook", mine], check=True, cwd=ROOT)
    ran = {}
    for name in ("sdft", "sft"):
        lines = (tmp_path / "docs" / "runs" / "tour" / name / "evaluations.jsonl").read_text().splitlines()
        ran[name] = {(line["step"], line["task"]): line for line in map(json.loads, lines)}
    sdft, sft = ran["sdft"], ran["sft"]
    assert (sdft[0, "new"]["accuracy"], sdft[0, "retention"]["accuracy"]) == (0.0, 1.0)
    assert sdft[60, "new"]["accuracy"] >= 0.9 and sdft[60, "retention"]["accuracy"] >= 0.98
    assert sdft[60, "retention"]["kl_to_start"] < 0.05 < sft[60, "retention"]["kl_to_start"]
    assert sft[60, "retention"]["accuracy"] < 0.8
