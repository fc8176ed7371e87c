"""On what a part runs, and how large."""

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Setup:
    """device: cuda or cpu. tiny: sizes for a test on a CPU. ranks: of the parts that train. out: the folder of the
    results."""

    device: str
    tiny: bool
    ranks: int
    out: str

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def sized(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    def environment(self, on_cpu: bool = False) -> dict[str, str]:
        """Of a process on the device, or of one that computes on the CPU what the device is compared with."""
        given = {"PYTHONWARNINGS": "ignore", **os.environ}  # deprecations inside the libraries
        return given if self.on_gpu and not on_cpu else {**given, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

    def flags(self) -> list[str]:
        return [*(f"--{name}={value}" for name, value in asdict(self).items() if name != "tiny"),
                *(["--tiny"] if self.tiny else [])]  # fmt: skip

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Setup":
        return cls(args.device, args.tiny, args.ranks, str(args.out))
