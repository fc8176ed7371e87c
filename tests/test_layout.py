"""The rules of the house that a program can check: imports flow one way, each framework is known in one place, nothing
that is read is evaluated."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdft_ds.cli import yaml_config

PACKAGE = Path(__file__).parents[1] / "sdft_ds"

# A package or module may import those of the lines before its own; those of one line do not import each other.
LAYERS = [
    {"distributed"},
    {"files"},
    {"data"},
    {"loss"},
    {"config"},
    {"checkpoint", "model", "model_card"},
    {"rollouts", "teacher"},
    {"metrics", "register"},
    {"report", "objectives"},
    {"loop"},
    {"trainer"},
    {"cli", "evaluation"},
    {"demo"},
    {"preview", "plan", "doctor"},
    {"compare", "train", "evaluate", "merge"},
    {"sequential"},
]
CORE = LAYERS[: [{"trainer"} <= layer for layer in LAYERS].index(True) + 1]
# The page of a run is written by the trainer when the run ends; it reads nothing but the run's folder.
TOOLS = {
    "cli", "evaluation", "demo", "preview", "plan", "doctor", "compare", "train", "evaluate", "merge", "sequential",
}  # fmt: skip

# Attributes of transformers.Trainer that are not part of its interface: an upgrade of transformers is checked by them.
TRAINER_PRIVATES = {
    "_evaluate", "_export_callbacks", "_finalize_training", "_finish_current_push", "_get_grad_norm",
    "_get_output_dir", "_init_training_state", "_initial_global_step", "_inner_training_loop",
    "_issue_warnings_after_load", "_load_best_model", "_load_optimizer_and_scheduler", "_push_from_checkpoint",
    "_run_epoch", "_save", "_save_checkpoint", "_save_optimizer_and_scheduler", "_save_rng_state", "_save_scaler",
    "_tr_loss", "_train_batch_size",
}  # fmt: skip
DEEPSPEED = re.compile(
    r"\bds_(id|tensor|shape|numel)\b|GatheredParameters|zero_optimization_stage|\.zero_stage\b|latest_universal|"
    r"parameter_offload\b|param_coordinator|\bstage\(engine\)|configured_stage\([^)]*\) *[=<>!]"
)
# What sets an attribute of a module, a class or an object that belongs to a library, to be found by its first lines.
PATCHES = re.compile(
    r"\.(forward|destroy|param_coordinator|generation_config) = |(engine|optimizer)\.step = |__compatible_ops__"
)


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


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


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def test_every_module_has_its_layer():
    assert {room(path) for path in modules()} == set().union(*LAYERS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "sdft_ds" and len(parts) > 1 and parts[1] != room(path):
            if any(parts[1] in names for names in LAYERS):
                assert layer(parts[1]) < layer(room(path)), f"{path} imports {name}"


def test_the_core_imports_no_tool():
    for path in modules():
        if any(room(path) in names for names in CORE):
            assert not {name.split(".")[1] for name in imports(path) if name.startswith("sdft_ds.")} & TOOLS, path


def test_modules_of_a_package_do_not_import_each_other_in_a_circle():
    graph = {path: set() for path in modules()}
    by_name = {"sdft_ds." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in graph}
    for path in graph:
        graph[path] = {by_name[name] for name in imports(path) if name in by_name} - {path}
    while graph:
        leaves = {path for path, needed in graph.items() if not needed & graph.keys()}
        assert leaves, sorted(map(str, graph))
        graph = {path: needed for path, needed in graph.items() if path not in leaves}


def test_only_distributed_knows_deepspeed():
    for path in modules():
        if room(path) != "distributed":
            assert not any(name.split(".")[0] == "deepspeed" for name in imports(path)), path
            if room(path) not in ("plan", "doctor"):  # which compute with the stages, and run no engine
                assert not DEEPSPEED.search(path.read_text()), (path, DEEPSPEED.search(path.read_text()))


def test_only_the_loop_names_the_privates_of_transformers_trainer():
    from transformers import Trainer

    from sdft_ds.trainer import SDFTTrainer

    ours = {
        name
        for each in SDFTTrainer.__mro__
        if each.__module__.startswith("sdft_ds")
        for name in vars(each)
        if name.startswith("_")
    }
    private = {name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")}
    assert ours & private <= TRAINER_PRIVATES
    source = Path(sys.modules["transformers.trainer"].__file__).read_text()
    missing = {name for name in TRAINER_PRIVATES if name not in source} - {"_export_callbacks"}
    assert not missing, f"this transformers has no {sorted(missing)}"
    for path in modules():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        named = {node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr in private - own}
        assert room(path) == "loop" and named <= TRAINER_PRIVATES or not named, (path, named)


def test_a_module_that_patches_says_so():
    for path in modules():
        if room(path) != "demo" and PATCHES.search(path.read_text()):
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert re.search(r"[Pp]atch|[Ss]ets|replace", said), path


def test_pickles_are_read_where_deepspeed_wrote_them_only():
    for path in modules():
        assert room(path) == "distributed" or not re.search(r"torch\.load\(|import pickle", path.read_text()), path


def test_nothing_evaluates_what_it_reads():
    """Neither text, nor YAML but by a safe loader."""
    for path in modules():
        calls = {
            ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        }
        assert not calls & {"eval", "exec", "yaml.unsafe_load", "yaml.full_load"}, path
        assert "yaml.load" not in calls or path.name == "yaml_config.py", path
    assert issubclass(yaml_config._Loader, yaml.SafeLoader)


def test_the_core_imports_without_deepspeed():
    """And the doctor without anything that may be missing."""
    everything = [
        "sdft_ds." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in modules()
        if any(room(path) in names for names in CORE) and path.name not in ("__init__.py", "__main__.py")
    ]  # fmt: skip
    program = "import sys; sys.modules['deepspeed'] = None; import importlib\n"
    program += f"for name in {everything!r}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", program], check=True)
    program = "import sys\nfor name in ('torch', 'transformers', 'datasets'): sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", program + "from sdft_ds.doctor import __main__, checks"], check=True)
