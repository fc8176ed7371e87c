"""A real vLLM server on the CPU, started by launch/vllm_server.sh, which serves the student of the tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import requests

from sdft_ds.distributed.launch import free_port
from tests.distributed.scenarios.export import student
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
SIZE = [
    "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--gpu-memory-utilization", "0.1",
    "--distributed-executor-backend", "uni",  # one process less to start
]  # fmt: skip  # one process less to start


class Server:
    """To be used after `wait`.

    arguments: of the script, after the model. adapters: whether it serves them. dev_mode: whether it has the endpoints
    for weights.
    """

    def __init__(self, folder: Path, *arguments: str, adapters: bool = False, dev_mode: bool = True):
        self.model, self.log = folder / "model", folder / "server.log"
        student(False).save_pretrained(self.model)
        tiny.tokenizer().save_pretrained(self.model)
        self.url = f"http://127.0.0.1:{free_port()}"
        script = ROOT / "launch" / "vllm_server.sh"
        without = script.read_text().replace("VLLM_SERVER_DEV_MODE=1", "VLLM_SERVER_DEV_MODE=0")
        before = ["--lora-rank", "4"] if adapters else []
        port = self.url.rpartition(":")[2]
        self.command = ["bash", *([] if dev_mode else ["-c", without]), script, *before, self.model, *SIZE]
        self.command += ["--port", port, *arguments]
        own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VENV": "none", "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self.start()

    def start(self) -> None:
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float = 400) -> None:
        given_up = time.monotonic() + seconds
        while not self.is_healthy():
            assert self.process.poll() is None and time.monotonic() < given_up, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def version(self) -> str:
        return requests.get(f"{self.url}/weight_info", timeout=60).json()["weight_version"]

    def forget(self) -> None:
        """What a restart does to the weights and their version, at once."""
        forget(self.url, str(self.model))

    @property
    def settings(self) -> dict[str, str]:
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": self.url}


def forget(url: str, model: str) -> None:
    for path, body in (
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": model}}),
        ("/collective_rpc", {"method": "repack_tied_head"}),
        ("/reset_prefix_cache", {}),
        ("/update_weight_version", {"new_version": "default"}),
    ):
        response = requests.post(url + path, json=body, timeout=60)
        assert response.ok, response.text
