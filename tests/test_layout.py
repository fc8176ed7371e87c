"""The house rules that a program can check: imports flow one way, and only zero.py knows ZeRO."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import yaml

from sdft_ds import settings_file

PACKAGE = Path(__file__).parent.parent / "sdft_ds"

# A module may import those before it. Packages count as one room.
ORDER = [
    "failure", "processes", "machine", "doctor", "whole_files", "module_state", "thin_products", "ranks", "checkpoint",
    "output_folder", "preemption", "shutdown", "rows", "prompts", "screening", "streams", "paired_batch", "prefix",
    "divergence", "zero", "packing", "inherited", "config_checks", "config", "recipes", "model_card", "schedule",
    "rollouts", "aggregation", "chunked_loss", "inspection", "head", "completion_head", "models", "teacher", "scoring",
    "run_state", "resume_settings", "lookout", "hub_upload", "resumable", "metrics", "step_guard", "generation_batch",
    "progress",
    "report", "compare", "completion_log", "run_record", "evaluation_loader", "trainer", "sft", "completions",
    "evaluation", "settings_file", "model_arguments", "arguments", "plan", "sources", "demo", "train", "evaluate",
    "preview", "sequential",
]  # fmt: skip
PURE = [
    "failure",
    "processes",
    "machine",
    "module_state",
    "thin_products",
    "ranks",
    "checkpoint",
    "rows",
    "prompts",
    "paired_batch",
    "prefix",
    "divergence",
    "schedule",
    "aggregation",
    "chunked_loss",
    "inspection",
    "zero",
    "metrics",
]


def modules():
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_room_has_its_place():
    assert {room(path) for path in modules()} == set(ORDER)


def test_imports_flow_one_way():
    for path in modules():
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "sdft_ds" and len(parts) > 1 and parts[1] in ORDER and parts[1] != room(path):
                assert ORDER.index(parts[1]) < ORDER.index(room(path)), f"{path.name} imports {name}"


def test_only_zero_knows_deepspeed():
    for path in modules():
        if room(path) != "zero":
            text = path.read_text()
            assert not any(name.split(".")[0] == "deepspeed" for name in imports(path)), path
            assert not any(word in text for word in ("ds_id", "ds_tensor", "GatheredParameters")), path


def test_pickles_are_read_where_deepspeed_wrote_them_only():
    for path in modules():
        assert room(path) == "zero" or not re.search(r"torch\.load\(|import pickle", path.read_text()), path


def test_nothing_evaluates_what_it_reads():
    """Neither text, nor YAML but by a safe loader."""
    for path in modules():
        calls = {
            ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        }
        assert not calls & {"eval", "exec", "yaml.unsafe_load", "yaml.full_load"}, path
        assert "yaml.load" not in calls or room(path) == "settings_file", path
    assert issubclass(settings_file._Loader, yaml.SafeLoader)


def test_pure_modules_import_without_deepspeed():
    program = "import sys; sys.modules['deepspeed'] = None\n" + "".join(
        f"import importlib.util as u; s = u.spec_from_file_location('sdft_ds.{name}', r'{PACKAGE / name}.py')\n"
        f"m = u.module_from_spec(s); sys.modules['sdft_ds.{name}'] = m; s.loader.exec_module(m)\n"
        for name in PURE
    )
    program = "import sys, types; sys.modules['sdft_ds'] = types.ModuleType('sdft_ds')\n" + program
    subprocess.run([sys.executable, "-c", program], check=True)
