"""Jobs on a real two-node SLURM cluster, by the scripts in launch/, unmodified but for the header that users edit."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdft_ds.checkpoint import storage
from tests.distributed.scenarios.export import student
from tests.helpers import tiny
from tests.helpers.vllm_server import SIZE

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "cluster.sh"
NEEDED = ["slurmctld", "slurmd", "sbatch", "sshd", "pdsh", "ip", "unshare", "nsenter"]
HEADER = ["--time=10", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
STEPS = 10
# The embedded default, a few steps of it, without its baseline's minutes.
FEW_STEPS = ["--max_steps", str(STEPS), "--save_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true",
             "--deepspeed", "ds_configs/zero3.json"]  # fmt: skip

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.full,
    pytest.mark.skipif(os.geteuid() != 0, reason="a cluster in namespaces needs root"),
    pytest.mark.skipif(
        any(shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None for name in NEEDED),
        reason=f"needs {', '.join(NEEDED)}: launch/test.sh --system-packages --full installs them on Debian",
    ),
]


class Cluster:
    """Hosts ctl, n1 and n2."""

    def __init__(self, folder: Path):
        self.folder = folder
        tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self.environment = {**os.environ, "PATH": tools, "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            self.environment.pop(name, None)
        self._run("up", folder)

    def down(self) -> None:
        self._run("down", self.folder)

    def _run(self, *arguments) -> str:
        done = subprocess.run(["bash", SCRIPT, *map(str, arguments)], cwd=ROOT, env=self.environment, text=True,
                              capture_output=True, timeout=240)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def on(self, host: str, *command) -> str:
        return self._run("on", host, self.folder, *command)

    def start(self, host: str, *command) -> subprocess.Popen:
        line = ["bash", SCRIPT, "on", host, self.folder, *command]
        return subprocess.Popen(list(map(str, line)), cwd=ROOT, env=self.environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    def submit(self, script: str, folder: Path, *flags, header=(), **variables: str) -> str:
        """The job's id. variables: of its environment. The header is what users edit; the rest of the script stays."""
        text = (ROOT / "launch" / "slurm" / script).read_text()
        head, rest = text.split("# ---- end of what is to be edited")
        head = re.sub(r"^#SBATCH .*\n", "", head, flags=re.M)
        lines = "".join(f"#SBATCH {option}\n" for option in [*HEADER, f"--output={folder}/job.log", *header])
        edited = folder / script
        edited.write_text(head + lines + "# ---- end of what is to be edited" + rest)
        own = ["env", *(f"{name}={value}" for name, value in variables.items())]
        return self.on("ctl", *own, "sbatch", "--parsable", edited, "--output_dir", folder / "run", *flags).strip()

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\w+)", self.on("ctl", "scontrol", "show", "job", job))[1]

    def wait(self, job: str, *states: str, seconds: float = 400) -> str:
        """Until the job is in one of the states. A job that was put back into the queue need not wait two minutes."""
        given_up = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < given_up, f"job {job} is {state} after {seconds} s"
            self._hurry(job, state)
            time.sleep(0.5)
        return state

    def _hurry(self, job: str, state: str) -> None:
        if state == "PENDING":
            subprocess.run(
                ["bash", SCRIPT, "on", "ctl", self.folder, "scontrol", "update", f"JobId={job}", "StartTime=now"],
                cwd=ROOT, env=self.environment, capture_output=True,
            )  # fmt: skip

    def wait_for_second_start(self, job: str, folder: Path, seconds: float = 400) -> None:
        """A job that is put back into the queue may be seen as failed for a moment: its log says that it runs."""
        given_up = time.monotonic() + seconds
        while "start 2" not in (folder / "job.log").read_text():
            assert time.monotonic() < given_up, (folder / "job.log").read_text()
            self._hurry(job, self.state(job))
            time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.down()


@pytest.fixture(scope="module")
def unbroken(cluster, tmp_path_factory):
    """The losses of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    job = cluster.submit("train.sbatch", folder, *FEW_STEPS)
    cluster.wait(job, "COMPLETED", "FAILED")
    return losses(folder)


def losses(folder: Path) -> list[float]:
    log = (folder / "job.log").read_text()
    newest, _ = storage.newest_complete(folder / "run")
    assert newest is not None and newest.name == f"checkpoint-{STEPS}", log
    state = json.loads((newest / "trainer_state.json").read_text())
    return [each["loss"] for each in state["log_history"] if "loss" in each]


def wait_for_checkpoint(folder: Path, seconds: float = 240) -> None:
    given_up = time.monotonic() + seconds
    while storage.newest_complete(folder / "run")[0] is None:
        assert time.monotonic() < given_up, (folder / "job.log").read_text()
        time.sleep(0.2)


def test_a_preempted_job_starts_again_and_ends_as_if_nothing_had_been(cluster, unbroken, tmp_path):
    """A job of a higher partition takes both nodes; ZeRO-3 over two nodes saves, waits, and goes on."""
    assert len(unbroken) == STEPS
    job = cluster.submit("train.sbatch", tmp_path, *FEW_STEPS)
    wait_for_checkpoint(tmp_path)
    higher = cluster.on("ctl", "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
                        "--output=/dev/null", "--wrap", "sleep 1").strip()  # fmt: skip
    cluster.wait(higher, "COMPLETED")
    cluster.wait_for_second_start(job, tmp_path)
    cluster.wait(job, "COMPLETED", "FAILED")
    log = (tmp_path / "job.log").read_text()
    assert "start 2" in log and "Resuming from" in log and "to be started again" in log, log
    assert not (tmp_path / "run" / "PREEMPTED").exists()
    assert losses(tmp_path) == unbroken


def test_the_line_of_the_readme(cluster, tmp_path):
    """The script as it is, with what this cluster has in the place of the names, and no GPUs."""
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, tiny.rows())))
    line = re.search(r"^sbatch .*?[^\\]\n", (ROOT / "README.md").read_text(), re.M | re.S)[0]
    here = {"gpu": "main", "4": "2", "Qwen/Qwen2.5-7B-Instruct": tmp_path / "model",
            "data.jsonl": tmp_path / "data.jsonl", "100": "2"}  # fmt: skip
    words = [here.pop(word, word) for word in shlex.split(line.replace("\\\n", ""))]
    assert not here, f"the line has changed: {line}"
    options = ["--parsable", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = cluster.on("ctl", words[0], *options, f"--output={tmp_path}/job.log", *words[1:], "--max_steps", "4",
                     "--num_generations", "2", "--max_completion_length", "8").strip()  # fmt: skip
    run = ROOT / "runs" / f"sdft-{job}"
    try:
        assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", (tmp_path / "job.log").read_text()
        assert storage.newest_complete(run)[0].name == "checkpoint-4"
        assert (run / "model.safetensors").exists()
    finally:
        shutil.rmtree(run, ignore_errors=True)


@pytest.mark.parametrize("how", ["time", "requeue"])
def test_a_job_that_is_told_to_end_is_started_again(cluster, unbroken, tmp_path, how):
    """By the signal before its time limit, and by the administrator's scontrol requeue."""
    job = cluster.submit("train.sbatch", tmp_path, *FEW_STEPS, header=["--signal=TERM@30"])
    wait_for_checkpoint(tmp_path)
    if how == "time":  # as --signal does it, 30 s before the end
        cluster.on("ctl", "scancel", "--signal=TERM", job)
        given_up = time.monotonic() + 60
        while not (tmp_path / "run" / "PREEMPTED").exists():
            assert time.monotonic() < given_up
            time.sleep(0.2)
    else:
        cluster.on("ctl", "scontrol", "requeue", job)
    cluster.wait_for_second_start(job, tmp_path)
    cluster.wait(job, "COMPLETED", "FAILED")
    assert "start 2" in (tmp_path / "job.log").read_text()
    assert losses(tmp_path) == unbroken


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    job = cluster.submit("train.sbatch", tmp_path, *FEW_STEPS)
    wait_for_checkpoint(tmp_path)
    cluster.on("ctl", "scancel", job)
    assert cluster.wait(job, "CANCELLED", "PENDING", "FAILED", "COMPLETED", seconds=120) == "CANCELLED"
    time.sleep(5)
    assert cluster.state(job) == "CANCELLED"


def test_a_stopped_job_is_not_started_again(cluster, tmp_path):
    job = cluster.submit("train.sbatch", tmp_path, *FEW_STEPS)
    wait_for_checkpoint(tmp_path)
    (tmp_path / "run" / "STOP").touch()
    cluster.wait(job, "FAILED", "COMPLETED")
    assert json.loads((tmp_path / "run" / "PREEMPTED").read_text())["by"] == "STOP"
    assert "start 2" not in (tmp_path / "job.log").read_text()


def test_a_dead_process_fails_the_job_and_the_next_start_resumes(cluster, unbroken, tmp_path):
    job = cluster.submit("train.sbatch", tmp_path, *FEW_STEPS)
    wait_for_checkpoint(tmp_path)
    for pid in cluster.on(
        "n2", "pgrep", "-f", "launch/train.py"
    ).split():  # both nodes' are seen: the last is one of them
        victim = pid
    cluster.on("n2", "kill", "-KILL", victim)
    assert cluster.wait(job, "FAILED", "COMPLETED") == "FAILED"
    job = cluster.submit("train.sbatch", tmp_path, *FEW_STEPS)
    cluster.wait(job, "COMPLETED", "FAILED")
    assert losses(tmp_path) == unbroken


@pytest.mark.parametrize("script", ["train_torchrun.sbatch", "train_deepspeed.sbatch"])
def test_jobs_by_a_launcher_are_preempted_and_go_on(cluster, unbroken, tmp_path, script):
    job = cluster.submit(script, tmp_path, *FEW_STEPS)
    wait_for_checkpoint(tmp_path)
    cluster.on("ctl", "scancel", "--signal=TERM", job)
    cluster.wait_for_second_start(job, tmp_path)
    cluster.wait(job, "COMPLETED", "FAILED")
    assert "start 2" in (tmp_path / "job.log").read_text()
    assert losses(tmp_path) == unbroken


@pytest.mark.timeout(1500)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: bash launch/vllm_environment.sh")
def test_a_job_whose_last_node_serves_is_preempted_and_goes_on(cluster, tmp_path):
    """With the losses of one node that rolls out by itself."""
    student(False).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, tiny.rows())))
    flags = ["--model_name_or_path", tmp_path / "model", "--dataset_path", tmp_path / "data.jsonl", *FEW_STEPS,
             "--max_completion_length", "8", "--bf16", "false", "--generation_kwargs", '{"do_sample": false}',
             "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--adam_epsilon", "1e-3"]  # fmt: skip
    (tmp_path / "local").mkdir()
    local = cluster.submit("train.sbatch", tmp_path / "local", *flags, header=["--nodes=1"])
    cluster.wait(local, "COMPLETED", "FAILED")
    serving = {"SERVER_ARGUMENTS": " ".join(SIZE), "VLLM_CPU_KVCACHE_SPACE": "1", "VENV": "none"}
    job = cluster.submit("train_vllm.sbatch", tmp_path, *flags, "--vllm_server_timeout", "600", **serving)
    wait_for_checkpoint(tmp_path, 600)
    cluster.on("ctl", "scancel", "--signal=TERM", job)
    cluster.wait_for_second_start(job, tmp_path)
    cluster.wait(job, "COMPLETED", "FAILED", seconds=600)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "local"), rel=1e-4)


def test_the_same_line_on_each_node(cluster, unbroken, tmp_path):
    line = ["env", "MASTER=n1", "NODES=2", "bash", "launch/multinode.sh", "--deepspeed", "ds_configs/zero3.json",
            "--output_dir", tmp_path / "run", "--save_strategy", "steps", *FEW_STEPS]  # fmt: skip
    both = [cluster.start(host, *line) for host in ("n1", "n2")]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    (tmp_path / "job.log").write_text("\n".join(outputs))
    assert [process.returncode for process in both] == [0, 0], outputs
    assert losses(tmp_path) == unbroken


def test_deepspeed_over_a_hostfile_and_ssh(cluster, unbroken, tmp_path):
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    line = ["deepspeed", "--hostfile", tmp_path / "hostfile", "--master_addr", "n1", "launch/train.py"]
    line += ["--deepspeed", "ds_configs/zero3.json", "--output_dir", tmp_path / "run", "--save_strategy", "steps"]
    process = cluster.start("n1", *line, *FEW_STEPS)
    output = process.communicate(timeout=240)[0]
    (tmp_path / "job.log").write_text(output)
    assert process.returncode == 0, output
    assert losses(tmp_path) == unbroken
