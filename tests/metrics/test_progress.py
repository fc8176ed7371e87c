import sys
import warnings

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from sdft_ds.loss.diagnostics import DistributionStats, TokenDiagnostics
from sdft_ds.metrics.meters import METRICS, Meters
from sdft_ds.metrics.progress import TrainingBar, TrainingProgress, summary, time_report, warnings_below_bars
from tests.helpers.host_syncs import HostSyncs


def test_a_line_says_loss_length_and_where_time_goes():
    logs = {"loss": 0.02134, "completions/mean_length": 12.43, "seconds/rollout": 0.91, "seconds/teacher": 0.3,
            "seconds/student": 0.62, "seconds/optimizer": 0.05}  # fmt: skip
    phases = "rollout 0.91 teacher 0.3 student 0.62 optimizer 0.05"
    assert summary(logs) == ("loss 0.0213", "12.4 tokens", "1.9 s/step", phases)


@pytest.mark.parametrize("columns, shown", [(80, 2), (100, 3), (160, 4), (50, 0)])
def test_the_bar_stays_a_bar(columns, shown):
    """However narrow the terminal: parts of the log line give way."""
    bar = TrainingBar(120, 0)
    bar.dynamic_ncols, bar.ncols = None, columns
    bar.parts = parts = ("loss 0.0213", "12.4 tokens", "1.9 s/step", "rollout 0.91 teacher 0.3 student 0.62")
    bar.update(60)
    line = str(bar)
    assert len(line) <= columns and line.count("█") + line.count(" " * 5) >= 5
    assert [part for part in parts if part in line] == list(parts[:shown])
    assert len(line.split("|")[1]) >= 12
    bar.close()


def test_a_warning_has_a_line_of_its_own_below_a_bar(capsys):
    bar = TrainingBar(120, 0)
    with warnings_below_bars():
        sys.stderr.write(warnings.formatwarning(UserWarning("look"), UserWarning, "file.py", 3))
    bar.close()
    before, _, _ = capsys.readouterr().err.partition("file.py:3: UserWarning: look")
    assert before.endswith("\r") and not before.split("\r")[-2].strip()


def test_the_end_says_where_time_went():
    def log(step, rollout):
        return {"step": step, "seconds/rollout": rollout, "seconds/teacher": 1.0, "seconds/student": 2.0,
                "seconds/optimizer": 1.0}  # fmt: skip

    # Two steps of 4 + 4 seconds and one of 12 + 4: rollouts took 20 of 32.
    history = [log(2, 4.0), {"step": 2, "eval_loss": 1.0}, log(3, 12.0), {"step": 3, "train_loss": 1.0}]
    assert time_report(history) == "Time: rollout 62 %, teacher 9 %, student 19 %, optimizer 9 %."
    assert time_report([]) == ""


def test_the_bar_of_a_resumed_run_begins_where_the_run_stands(capsys):
    args = TrainingArguments("unused", report_to="none", use_cpu=True)
    state = TrainerState(max_steps=10, global_step=7)
    bar = TrainingProgress()
    bar.on_train_begin(args, state, TrainerControl())
    assert bar.training_bar is None  # until the other callbacks have said what they say first
    bar.on_epoch_begin(args, state, TrainerControl())
    assert bar.training_bar.initial == bar.training_bar.n == 7  # tqdm's rate is that of what comes after
    state.global_step = 8
    bar.on_step_end(args, state, TrainerControl())
    assert bar.training_bar.n == 8
    bar.on_train_end(args, state, TrainerControl())


def in_phases(meters):
    """Phases that begin and end at MOMENTS."""
    with meters.phase("student"):  # 0 ... 14
        with meters.phase("optimizer"):  # 10 ... 11
            pass
    with meters.phase("rollout"):  # 16 ... 20
        pass
    with pytest.raises(KeyError), meters.phase("teacher"), meters.phase("rollout"):  # not counted
        raise KeyError
    with meters.phase("student"):  # 21 ... 40
        with meters.phase("optimizer"):  # 23 ... 30
            pass


def seconds(meters):
    values = meters.collect(1)
    return {name: values[f"seconds/{name}"] for name in ("optimizer", "rollout", "student", "teacher")}


MOMENTS = (0.0, 10.0, 11.0, 14.0, 16.0, 20.0, 20.0, 20.0, 21.0, 23.0, 30.0, 40.0)
SECONDS = {"optimizer": 1.0 + 7.0, "rollout": 4.0, "student": 13.0 + 12.0, "teacher": 0.0}


def test_a_phase_within_a_phase_has_its_own_time(monkeypatch):
    now = iter(MOMENTS)
    meters = Meters(lambda tensor, how: tensor, torch.device("cpu"))
    monkeypatch.setattr(meters, "_now", lambda: next(now))
    in_phases(meters)
    assert seconds(meters) == SECONDS


def test_on_a_device_phases_are_timed_by_events_that_are_read_when_a_log_line_is_due(monkeypatch):
    """As on CUDA, whose events this stands in for."""
    now, read = iter(MOMENTS), []

    class Event:
        def __init__(self, device, enable_timing):
            assert device.type == "cuda" and enable_timing

        def record(self):
            self.at = next(now)

        def synchronize(self):
            read.append(self)

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)

    meters = Meters(lambda tensor, how: tensor, torch.device("cpu"))
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", None)
    meters.device = torch.device("cuda")
    in_phases(meters)
    assert not read
    meters.device = torch.device("cpu")
    assert seconds(meters) == SECONDS and read


@pytest.mark.parametrize("anchors", [False, True])
def test_metrics_stay_on_the_device_until_a_log_line_is_due(anchors):
    meters = Meters(lambda tensor, how: tensor, torch.device("cpu"))
    per_token, offsets = torch.rand(50), torch.arange(50) * 7
    anchor = torch.arange(50) % 3 == 0 if anchors else None
    side = DistributionStats(torch.rand(4), torch.ones(4, 5), torch.rand(4, 5), torch.rand(4))
    seen, old = TokenDiagnostics(side, side, -torch.rand(4)), -torch.rand(4)
    differences = [torch.tensor([0.1, -0.3]), torch.tensor([0.2]), torch.zeros(0)]
    with HostSyncs() as syncs:
        for each in differences:
            meters.add_divergences(per_token, offsets, anchor)
            meters.add_mismatch(each)
            meters.add_diagnostics(seen, old, 2.0)
    assert not syncs.found
    with HostSyncs() as syncs:
        values = meters.collect(1)
    assert syncs.found["tolist"] == 1 and not syncs.found["_local_scalar_dense"]
    assert values["rollout/logprob_diff_max"] == pytest.approx(0.3)
    assert values["rollout/logprob_diff"] == pytest.approx(0.2)
    own = per_token if anchor is None else per_token[~anchor]
    assert values["sdft/distillation_loss"] == pytest.approx(own.mean().item(), rel=1e-5)
    assert values["completions/loss_tokens"] == 3 * len(own)
    assert values["divergence/p50"] == pytest.approx(own.quantile(0.5).item(), rel=0.1)
    if anchors:
        assert values["anchors/distillation_loss"] == pytest.approx(per_token[anchor].mean().item(), rel=1e-5)


def test_every_metric_says_its_unit_and_is_joined_by_a_known_reduction():
    for name, metric in METRICS.items():
        assert metric.unit and metric.meaning, name
        assert metric.reduction in ("mean", "norm ratio", "max", "min", "sum", "slowest", "rate", "quantile"), name


def test_reductions_over_two_ranks():
    """Each reduction, with a second rank that added the same to the sums and has other extremes."""
    other = {"sum": lambda t: t * 2, "max": lambda t: torch.maximum(t, torch.full_like(t, 5.0))}
    meters = Meters(lambda tensor, how: other[how](tensor), torch.device("cpu"))
    for value in (2, 4):
        meters.add("completions/mean_length", value)
        meters.add("completions/min_length", value)
        meters.add("completions/max_length", value)
        meters.add("completions/loss_tokens", value)
        meters.add("teacher/distance", value, 6.0)
    values = meters.collect(steps=2)
    assert values["completions/mean_length"] == 3 and values["completions/max_length"] == 5
    assert values["completions/loss_tokens"] == 12 and values["teacher/distance"] == (6 / 12) ** 0.5
    assert values["completions/min_length"] == -5  # the other rank's, which are kept as negatives
    assert "sdft/distillation_loss" not in values  # nothing was counted
    assert meters.collect(1)["completions/loss_tokens"] == 0


def test_phases_that_nobody_collects_are_added_up(monkeypatch):
    monkeypatch.setattr(sys.modules[Meters.__module__], "MANY_SPANS", 4)
    made = Meters(lambda tensor, how: tensor, torch.device("cpu"))
    for _ in range(10):
        with made.phase("student"), made.phase("teacher"):
            pass
    assert len(made.spans) < 4
    found = made.collect(steps=1)
    assert found["seconds/student"] > 0 and found["seconds/teacher"] > 0
