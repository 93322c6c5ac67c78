"""train.py in several processes: the same step as one, shards, filters and faults that differ between them, signals, a death."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, metrics
from safetensors.torch import load_file

import checkpoint
import train

FLAGS = ("--model shapes --no-kl --filter-low --steps 2 --prompts-per-step 4 --group-size 4 --unmask-steps 8 --filter-warmup 6 "
         "--filter-percentile 90 --eval-every 2 --eval-n 1 --sample-every 0").split()


def torchrun(*command, processes=2):
    """torchrun, as a user starts it -> subprocess.Popen."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *map(str, command)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two_processes.py leaves."""
    out = tmp_path_factory.mktemp("two")
    started = torchrun(ROOT / "tests/two_processes.py", out)
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors[-3000:]
    return out


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, *map(str, flags)])
    train.main()


def weights(folder):
    return load_file(folder / "pytorch_model.safetensors")


def near(a, b):
    """All tensors of two dicts together, to 1e-5 of their norm (one by one, Adam turns rounding of a zero gradient into steps)."""
    assert a.keys() == b.keys() and all(a[name].dtype == b[name].dtype for name in a)
    a, b = (torch.cat([x[name].flatten() for name in a]) for x in (a, b))
    assert (a - b).norm() <= 1e-5 * a.norm()


def moments(folder, kind):
    return {name: state[kind] for name, state in torch.load(folder / "trainer.pt")["optimizer"]["state"].items()}


def test_two_processes_take_the_step_of_one_with_twice_the_prompts(two, tmp_path, monkeypatch):
    gradients, plain = [], torch.optim.AdamW.step

    def step(self, *rest):
        gradients.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
        return plain(self, *rest)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    call(monkeypatch, "--prompts-per-step", 8, "--out", tmp_path / "one")
    shared = torch.load(two / "two.pt")
    assert len(gradients) == len(shared) == 2
    for a, b in zip(gradients, shared):
        assert (a - b).norm() <= 1e-5 * a.norm() and a.norm() > 0
    rows = metrics(tmp_path / "one"), metrics(two / "two")
    assert rows[0][1]["resampled"] == rows[1][1]["resampled"] > 0
    assert rows[0][0]["reward_mean"] == rows[1][0]["reward_mean"]
    near(weights(tmp_path / "one/checkpoint-2"), weights(two / "two/checkpoint-2"))
    assert checkpoint.read_rows(tmp_path / "one/eval.jsonl")[0] == checkpoint.read_rows(two / "two/eval.jsonl")[0]


def test_two_processes_resume_bit_by_bit(two):
    assert metrics(two / "two-then-two") == metrics(two / "two")
    a, b = (weights(two / f"{run}/checkpoint-2") for run in ("two", "two-then-two"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        a, b = (moments(two / f"{run}/checkpoint-2", kind) for run in ("two", "two-then-two"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_shards_take_the_same_step_and_leave_the_same_files(two):
    for a, b in zip(torch.load(two / "two.pt"), torch.load(two / "fsdp.pt"), strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() and a.norm() > 0
    names = [sorted(f.name for f in (two / run / "checkpoint-2").iterdir()) for run in ("two", "fsdp")]
    assert names[0] == names[1]
    for run in ("fsdp", "two-then-fsdp", "fsdp-then-two"):
        near(weights(two / "two/checkpoint-2"), weights(two / run / "checkpoint-2"))
        a, b = (torch.load(two / name / "checkpoint-2/trainer.pt") for name in ("two", run))
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            near(moments(two / "two/checkpoint-2", kind), moments(two / run / "checkpoint-2", kind))
        assert a["filter"] == b["filter"] and len(a["filter"]["history"]) >= 16
        assert [row["step"] for row in metrics(two / run)] == [1, 2]


def test_another_number_of_processes_goes_on_with_a_notice(two, tmp_path, monkeypatch, capsys):
    def resumed(name, *flags):
        shutil.copytree(two / "two", tmp_path / name, ignore=lambda *_: ["checkpoint-2"])
        call(monkeypatch, "--out", tmp_path / name, "--resume", *flags)
        return capsys.readouterr().out
    assert "notice: 1 processes, they were 2" in resumed("same", "--prompts-per-step", 8)
    near(weights(two / "two/checkpoint-2"), weights(tmp_path / "same/checkpoint-2"))
    assert "notice: a step takes 4 prompts, it was 8" in resumed("fewer")
    assert "notice: --steps is 3, it was 2" in resumed("longer", "--prompts-per-step", 8, "--steps", 3)
    assert [row["step"] for row in metrics(tmp_path / "longer")] == [1, 2, 3] and (tmp_path / "longer/checkpoint-3").exists()


def test_processes_that_filter_differently_stay_together(two):
    rows = metrics(two / "filtered")
    assert len(rows) == 5 and all(8 <= row["resampled"] <= 16 for row in rows[1:3])    # process 1: its 4 groups, twice
    assert min(torch.load(two / "filtered.pt"), key=lambda g: g.norm()).norm() > 0


def test_what_is_not_finite_skips_the_step_everywhere(two):
    rows = metrics(two / "not-finite")
    assert [row["skipped"] for row in rows] == [1, 1, 1, 0, 0] and len(torch.load(two / "not-finite.pt")) == 2
    assert all(len(row["faults"]) == 4 for row in rows[:3]) and rows[3]["faults"] == []
    assert set(rows[0]["faults"]) <= {line["prompt"] for line in train.shapes.prompts("train")}
    assert rows[0]["reward_mean"] is not None
    for rank in (0, 1):
        assert re.search(r"^2 steps .* not finite; the last good checkpoint is .*never-finite/checkpoint-2;",
                         (two / f"never-finite-{rank}.txt").read_text())


def test_one_process_asked_to_stop_stops_all_and_saves(two):
    assert len(metrics(two / "asked")) == 2 and checkpoint.damage(two / "asked/checkpoint-2") is None


def test_a_process_that_drifts_is_named(two):
    for rank in (0, 1):
        assert (two / f"drifted-{rank}.txt").read_text().startswith("process 1 of 2 no longer holds the parameters of process 0")
    assert len(metrics(two / "drifted")) == 2


def wait_for(path, started):
    """Until a file is there."""
    while not (path.exists() and path.stat().st_size):
        assert started.poll() is None, started.communicate()[1][-3000:]
        time.sleep(0.05)


def test_torchrun_passes_a_signal_on_and_every_process_saves(tmp_path):
    started = torchrun(ROOT / "train.py", *FLAGS, "--steps", 500, "--out", tmp_path / "run")
    wait_for(tmp_path / "run/metrics.jsonl", started)
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=120)
    last = metrics(tmp_path / "run")[-1]["step"]
    assert f"stopped after step {last}, as a signal asked" in said and last < 500
    assert checkpoint.damage(tmp_path / f"run/checkpoint-{last}") is None


def test_a_process_that_dies_takes_the_job_down_with_its_own_error(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
plain = train.collect
def collect(step, *rest):
    if step == 1 and os.environ["RANK"] == "1":
        raise OSError("the disk of machine 1 is gone")
    return plain(step, *rest)
train.collect = collect
train.run(train.main)
""")
    started = torchrun(script, *FLAGS, "--steps", 500, "--out", tmp_path / "run")
    _, errors = started.communicate(timeout=120)
    assert started.returncode != 0 and "the disk of machine 1 is gone" in errors and len(metrics(tmp_path / "run")) == 1


def test_a_line_of_json_per_step(two):
    for line in (two / "not-finite/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
