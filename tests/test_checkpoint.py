"""Saving, resuming, stopping: what was saved is whole or passed over, whatever happens, and a run goes on bit by bit the same."""
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics
from safetensors.torch import load_file

import checkpoint
import train
from sample import load_models

TINY = ("--model shapes --no-kl --steps 4 --prompts-per-step 8 --group-size 4 --unmask-steps 8 --eval-every 0 --sample-every 0 --save-every 1 "
        "--lr 1e-3").split()


@pytest.fixture(autouse=True)
def signals():
    """Left as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *map(str, flags)])
    train.main()


def same(a, b):
    """The same steps and, at the end, the same weights and optimizer, bit by bit."""
    assert metrics(a) == metrics(b)
    x, y = (checkpoint.checkpoints(out)[-1] for out in (a, b))
    weights, others = (load_file(folder / "pytorch_model.safetensors") for folder in (x, y))
    assert x.name == y.name and all(torch.equal(weights[name], others[name]) for name in weights)
    x, y = (torch.load(folder / "trainer.pt") for folder in (x, y))
    assert x["filter"] == y["filter"] and x["step"] == y["step"]
    for name, moments in x["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], y["optimizer"]["state"][name][k]) for k in ("step", "exp_avg", "exp_avg_sq"))


def test_a_seed_fixes_everything_and_a_resumed_run_is_the_run(monkeypatch, tmp_path):
    flags = ("--filter-low", "--filter-warmup", 4, "--max-resample", 2, "--inner-epochs", 2, "--steps", 6, "--save-every", 3, "--prompts-per-step", 4)
    call(monkeypatch, "--out", tmp_path / "straight", *flags)
    call(monkeypatch, "--out", tmp_path / "again", *flags)
    same(tmp_path / "straight", tmp_path / "again")
    shutil.copytree(tmp_path / "straight", tmp_path / "auto", ignore=lambda *_: ["checkpoint-6"])
    call(monkeypatch, "--out", tmp_path / "auto", "--resume", *flags)
    same(tmp_path / "straight", tmp_path / "auto")
    call(monkeypatch, "--resume", tmp_path / "again/checkpoint-3", *flags)
    same(tmp_path / "straight", tmp_path / "again")
    assert [f.name[:20] for f in sorted((tmp_path / "again").glob("checkpoint-6.*"))] == ["checkpoint-6.before-"]     # set aside, not lost
    assert torch.load(tmp_path / "again/checkpoint-6/trainer.pt")["filter"]["history"]
    call(monkeypatch, "--out", tmp_path / "other", *flags, "--seed", 43)
    assert metrics(tmp_path / "other") != metrics(tmp_path / "straight")


def test_killed_twenty_times_it_is_still_the_same_run(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tests/killed.py"), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, torn = json.loads(done.stdout)
    assert len(steps) == 20 and steps == sorted(steps) and 5 < steps[-1] < 40 and torn > 0      # some were killed while they saved
    same(tmp_path / "straight", tmp_path / "killed")
    assert len(checkpoint.checkpoints(tmp_path / "killed")) == 2 and not list((tmp_path / "killed").glob(".*"))


def test_signals_stop_at_a_step_boundary_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
    flags = ("--save-every", 0)
    call(monkeypatch, "--out", tmp_path / "straight", *flags)
    plain, steps = train.update, []

    def update(step, *rest):
        steps.append(step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(step, *rest)
    monkeypatch.setattr(train, "update", update)
    call(monkeypatch, "--out", tmp_path / "run", *flags)
    assert steps == [0, 1] and "stopped after step 2" in capsys.readouterr().out
    monkeypatch.setattr(train, "update", plain)
    call(monkeypatch, "--out", tmp_path / "run", "--resume", *flags)
    same(tmp_path / "straight", tmp_path / "run")


def test_a_second_signal_ends_at_once(monkeypatch):
    stop, ended = checkpoint.Stop(), []
    monkeypatch.setattr(checkpoint.os, "_exit", ended.append)

    def until(happened):
        for _ in range(500):
            if happened():
                return
            time.sleep(0.01)
        pytest.fail("nothing heard in 5 s")
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: stop.asked)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    assert ended == []                                          # the same one, passed on by torchrun
    stop.asked -= 2
    os.kill(os.getpid(), signal.SIGINT)
    until(lambda: ended)
    assert ended == [128 + signal.SIGINT]


def test_damaged_checkpoints_are_passed_over_and_old_ones_dropped(monkeypatch, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ("--keep-last", 3)
    call(monkeypatch, "--out", run, *flags)
    assert [f.name for f in checkpoint.checkpoints(run)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    shutil.copytree(run, tmp_path / "straight")
    damaged = bytearray((run / "checkpoint-4/pytorch_model.safetensors").read_bytes())
    damaged[-100] ^= 1
    (run / "checkpoint-4/pytorch_model.safetensors").write_bytes(damaged)
    (run / "checkpoint-3/trainer.pt").unlink()
    call(monkeypatch, "--out", run, "--resume", *flags)
    said = capsys.readouterr().err
    assert "passing over checkpoint-4: " in said and "pytorch_model.safetensors is not as it was saved" in said and "passing over checkpoint-3" in said
    same(run, tmp_path / "straight")
    assert all(checkpoint.damage(f) is None for f in checkpoint.checkpoints(run))
    shutil.copytree(run, tmp_path / "hopeless")
    for folder in checkpoint.checkpoints(tmp_path / "hopeless"):
        (folder / "trainer.pt").write_bytes(b"")
    with pytest.raises(train.InputError, match="no checkpoint in .*hopeless is whole"):
        call(monkeypatch, "--out", tmp_path / "hopeless", "--resume", *flags)
    assert metrics(tmp_path / "hopeless") == metrics(run)
    (run / "checkpoint-4/manifest.json").write_text("{}")
    with pytest.raises(train.InputError, match="manifest.json does not list trainer.pt"):
        call(monkeypatch, "--resume", run / "checkpoint-4", *flags)


def test_a_run_stopped_before_it_saved_begins_again(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    call(monkeypatch, "--out", tmp_path / "run", "--eval-every", 2, "--eval-n", 1, "--eval-unmask-steps", 4)
    rows, evals = metrics(tmp_path / "run"), (tmp_path / "run/eval.jsonl").read_text()
    call(monkeypatch, "--out", tmp_path / "run", "--eval-every", 2, "--eval-n", 1, "--eval-unmask-steps", 4, "--resume")
    assert metrics(tmp_path / "run") == rows and (tmp_path / "run/eval.jsonl").read_text() == evals


@pytest.mark.parametrize("limit, file", [(1_000_000, "weights"), (5_000_000, "trainer.pt")])
def test_a_disk_that_takes_no_more_keeps_what_was_saved(monkeypatch, tmp_path, limit, file):
    """The limit of a file's size stands for a full disk: writing fails in the same places."""
    call(monkeypatch, "--out", tmp_path / "run", "--steps", 1)
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, "--steps", "2", "--resume"], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"checkpoint-2: cannot be saved .*checkpoint-1 is whole; make room", done.stderr.splitlines()[-1])
    assert [f.name for f in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-1"] and checkpoint.damage(tmp_path / "run/checkpoint-1") is None


def test_gradients_that_are_not_finite_are_skipped_and_end_the_run(monkeypatch, tmp_path, capsys):
    plain = train.clipped_objective
    monkeypatch.setattr(train, "clipped_objective", lambda *a: plain(*a) * float("nan"))
    with pytest.raises(train.InputError, match="^2 steps had something that is not finite.*run/checkpoint-2; look"):
        call(monkeypatch, "--out", tmp_path / "run", "--max-bad-steps", 2, "--save-every", 0)
    rows = metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [1, 1] and rows[0]["grad_norm"] is None
    assert len(rows[0]["faults"]) > 1 and "step 1 skipped" in capsys.readouterr().out       # every prompt of the pass
    saved = load_file(tmp_path / "run/checkpoint-2/pytorch_model.safetensors")
    base = load_file(ROOT / "shapes/pytorch_model.safetensors")
    assert all(torch.equal(saved[name], base[name]) for name in base)
    monkeypatch.setattr(train, "clipped_objective", plain)
    call(monkeypatch, "--out", tmp_path / "run", "--max-bad-steps", 3, "--resume")
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [1, 1, 0, 0]


def test_log_probabilities_that_are_not_finite_are_logged_with_their_prompt(monkeypatch, tmp_path):
    plain, asked = train.transition_log_prob, []

    def spoilt(logits, **move):
        out = plain(logits, **move)
        return out * torch.where(torch.arange(len(out)) == 5, float("inf"), 1)
    monkeypatch.setattr(train, "transition_log_prob", spoilt)
    collect = train.collect
    monkeypatch.setattr(train, "collect", lambda *a: asked.append(collect(*a)) or asked[-1])
    call(monkeypatch, "--out", tmp_path / "run", "--steps", 1)
    row, = metrics(tmp_path / "run")
    used = train.group_advantages(asked[0].rewards).flatten().nonzero()[:, 0]
    assert row["skipped"] == 1 and row["faults"] == [asked[0].texts[used[5] // 4]]


def test_alarms(monkeypatch, tmp_path, capsys):
    call(monkeypatch, "--out", tmp_path / "calm")
    assert "ALARM" not in capsys.readouterr().out
    row = {**checkpoint.read_rows(tmp_path / "calm/metrics.jsonl")[0], "approx_kl": math.inf, "kl_ref": 9.0, "ratio_max": 11.0}
    checkpoint.Log(tmp_path, type("Args", (), {"steps": 4, "wandb": None}), 0, -1).step(row)
    said = capsys.readouterr().out
    assert "ALARM: ratio_max 11 is above 10" in said and "ALARM: approx_kl inf is above 0.5" in said and said.count("ALARM") == 2
    assert checkpoint.read_rows(tmp_path / "metrics.jsonl")[0]["approx_kl"] is None


def test_the_saved_state_does_not_depend_on_when_it_was_saved(monkeypatch, tmp_path):
    """Also when the first steps are skipped, so that the optimizer has no state yet."""
    plain = train.clipped_objective
    for name, every in (("often", 1), ("once", 0)):
        passes = []
        monkeypatch.setattr(train, "clipped_objective", lambda *a: passes.append(1) or plain(*a) * (float("nan") if len(passes) < 3 else 1))  # noqa: B023
        call(monkeypatch, "--out", tmp_path / name, "--save-every", every)
    assert metrics(tmp_path / "once")[0]["skipped"] == 1
    same(tmp_path / "often", tmp_path / "once")


def test_a_weight_decay_that_is_given_now_holds(monkeypatch, tmp_path, capsys):
    call(monkeypatch, "--out", tmp_path / "run", "--steps", 4, "--save-every", 2)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    call(monkeypatch, "--resume", tmp_path / "run/checkpoint-2", "--weight-decay", 5.0)
    assert "notice: --weight-decay is 5.0, it was 0.0" in capsys.readouterr().out
    norms = [sum(w.norm() for w in load_file(tmp_path / f"{run}/checkpoint-4/pytorch_model.safetensors").values()) for run in ("run", "other")]
    assert norms[0] < 0.9999 * norms[1]


def test_processes_that_drift_apart_are_named():
    params = [torch.ones(3), torch.full((2,), float("nan"))]
    checkpoint.in_step(params, lambda own: own.repeat(4))
    with pytest.raises(train.InputError, match="process 0, 2 of 5 no longer holds the parameters of the others"):
        checkpoint.in_step(params, lambda own: own.repeat(5) + torch.tensor([1, 0, 1, 0, 0]))


def test_no_code_in_a_pickle_runs(monkeypatch, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    call(monkeypatch, "--out", tmp_path / "run", "--steps", 1)
    trainer = tmp_path / "run/checkpoint-1/trainer.pt"
    torch.save({"step": 1, "args": Bomb()}, trainer)
    checkpoint.write_json(trainer.with_name("manifest.json"), {"trainer.pt": [trainer.stat().st_size, checkpoint.crc32(trainer)]})
    with pytest.raises(train.InputError, match="trainer.pt cannot be read"):
        call(monkeypatch, "--resume", tmp_path / "run/checkpoint-1")
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(train.InputError, match="bomb.pth: cannot be read as a weights file"):
        load_models("shapes", ckpt=tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()
