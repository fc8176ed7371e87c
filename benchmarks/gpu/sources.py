"""Whether the sources fit what is installed: the names that they take from torch, and that they import."""

import ast
import importlib
import pkgutil
from pathlib import Path

import torch

import sdft_ds

NEEDS_VLLM = "sdft_ds.rollouts.vllm"  # modules that an environment without vLLM need not import


def missing_names(folder: Path) -> list[str]:
    """Names like torch.accelerator.synchronize in the sources of a package that this torch does not have."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (name := ast.unparse(node)).startswith("torch."):
                found.add(name)
    return sorted(name for name in found if "(" not in name and not _resolves(name.split(".")))


def _resolves(parts: list[str]) -> bool:
    here, path = torch, parts[0]
    for part in parts[1:]:
        path += f".{part}"
        try:
            here = getattr(here, part) if hasattr(here, part) else importlib.import_module(path)
        except ImportError:
            return False
    return True


def unimportable() -> dict[str, str]:
    broken = {}
    for module in pkgutil.walk_packages(sdft_ds.__path__, "sdft_ds."):
        if module.name.startswith(NEEDS_VLLM) or module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except Exception as error:
            broken[module.name] = f"{type(error).__name__}: {error}"
    return broken
