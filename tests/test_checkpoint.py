"""Saving, resuming, stopping: what was saved is whole, whatever happens, and a run goes on bit by
bit the same.

Started as a script, test_checkpoint.py OUT: a run of train.py that is killed (SIGKILL) four times,
in rollout, update and saving by turns, each time at a random moment, and continued with --resume;
beside it the same run in one piece."""
import gc
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import metrics
from filelock import FileLock
from safetensors.torch import load_file

import checkpoint
import common
import train
from model import load_models, load_showo

TINY = ("--model shapes --no-kl --steps 4 --prompts-per-step 4 --group-size 4 --unmask-steps 4 "
        "--eval-every 0 --save-every 1 --lr 1e-3 --reward geneval:partial").split()


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *map(str, flags)])
    train.main()


def weights(folder):
    return load_file(folder / "pytorch_model.safetensors")


def trainer(folder):
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    return torch.load(folder / "trainer.pt", weights_only=True) | {"optimizer": optimizer}


def equal(a, b):
    """Return whether two dicts hold the same tensors, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(a, b):
    """Demand the same steps and, at the end, the same weights and optimizer, bit by bit."""
    assert metrics(a) == metrics(b)
    x, y = (checkpoint.checkpoints(out)[-1] for out in (a, b))
    assert x.name == y.name and equal(weights(x), weights(y))
    x, y = trainer(x), trainer(y)
    assert x["filter"] == y["filter"] and x["step"] == y["step"] and equal(x["lora"], y["lora"])
    x, y = x["optimizer"], y["optimizer"]
    assert x["param_groups"] == y["param_groups"] and x["state"].keys() == y["state"].keys()
    for index, moments in x["state"].items():
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert equal(moments, y["state"][index])


# ------------------------------------------------------------------------------ the same run

@pytest.mark.parametrize("flags", [
    ("--filter-low", "--inner-epochs", 2), ("--kl", "--transition", "p1"),
    ("--kl", "--lora", 2, "--ratio", "mean"), ("--transition", "ar", "--loss-steps", 2,
                                               "--loss-steps-from", "random")])
def test_a_resumed_run_is_the_run(monkeypatch, tmp_path, flags):
    monkeypatch.setattr(train.SampleFilter, "bar", property(lambda own: 0.3))
    straight, again = tmp_path / "straight", tmp_path / "again"
    call(monkeypatch, "--out", straight, "--save-every", 2, *flags)
    shutil.copytree(straight, again, ignore=lambda *_: ["checkpoint-4"])
    call(monkeypatch, "--out", again, "--save-every", 2, "--resume", *flags)
    same(straight, again)
    assert any(row["resampled"] for row in metrics(straight)) == ("--filter-low" in flags)


def test_going_back_to_a_checkpoint_keeps_the_later_ones(monkeypatch, tmp_path):
    run = tmp_path / "run"
    call(monkeypatch, "--out", run, "--steps", 3)
    rows, last = metrics(run), weights(run / "checkpoint-3")
    call(monkeypatch, "--resume", run / "checkpoint-2", "--steps", 3)
    assert metrics(run) == rows and equal(weights(run / "checkpoint-3"), last)
    kept = [folder.name.split("-")[1] for folder in run.glob("checkpoint-*.replaced-*")]
    assert kept == ["3.replaced"]
    for folder in checkpoint.checkpoints(run):      # weights of all, the optimizer of two
        assert (folder / "optimizer.pt").exists() == (folder.name != "checkpoint-1")
        load_showo(folder)
    with pytest.raises(SystemExit, match="optimizer's state is kept with the newest two checkpoints"
                       " alone; begin anew from its weights, with --ckpt .*checkpoint-1"):
        call(monkeypatch, "--resume", run / "checkpoint-1", "--steps", 3)
    gc.collect()
    call(monkeypatch, "--out", tmp_path / "other", "--steps", 3, "--seed", 43)
    assert metrics(tmp_path / "other") != rows


def test_killed_four_times_it_is_still_the_same_run(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = json.loads(done.stdout)
    assert len(steps) == 4 and steps == sorted(steps) and 0 < steps[-1] < 12
    same(tmp_path / "straight", tmp_path / "killed")
    assert len(checkpoint.checkpoints(tmp_path / "killed")) == 2        # --keep-last
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_signals_stop_at_a_step_boundary_and_the_run_goes_on(monkeypatch, tmp_path, capsys, number):
    flags, steps = ("--save-every", 0), []
    call(monkeypatch, "--out", tmp_path / "straight", *flags)
    plain = train.update

    def update(step, *rest):
        steps.append(step)
        if step == 1:
            os.kill(os.getpid(), number)
        return plain(step, *rest)
    monkeypatch.setattr(train, "update", update)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "--out", tmp_path / "run", *flags)
    assert end.value.code == 128 + number
    del end
    gc.collect()            # its lock goes with it
    assert steps == [0, 1] and "stopped by a signal after step 2" in capsys.readouterr().out

    monkeypatch.setattr(train, "update", plain)
    call(monkeypatch, "--out", tmp_path / "run", "--resume", *flags)
    same(tmp_path / "straight", tmp_path / "run")


def test_a_run_stopped_before_it_saved_begins_again(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    call(monkeypatch, "--out", tmp_path / "run", "--steps", 2)
    rows = metrics(tmp_path / "run")
    call(monkeypatch, "--out", tmp_path / "run", "--steps", 2, "--resume")
    assert len(rows) == 2 and metrics(tmp_path / "run") == rows


def test_a_weight_decay_that_is_given_now_holds(monkeypatch, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    call(monkeypatch, "--out", run, "--save-every", 2)
    shutil.copytree(run, other)
    call(monkeypatch, "--resume", run / "checkpoint-2", "--weight-decay", 5.0)
    norms = [sum(w.norm() for w in weights(out / "checkpoint-4").values()) for out in (run, other)]
    assert norms[0] < 0.9999 * norms[1]


def test_what_a_resume_must_not_change(monkeypatch, tmp_path):
    run = tmp_path / "run"
    call(monkeypatch, "--out", run, "--steps", 2)
    before = [path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()]
    for flags, line in ((["--group-size", 8], "that run has --group-size 4; give the same"),
                        (["--kl", "--seed", 1], "that run has --kl False, --seed 42; give"),
                        (["--steps", 1], "checkpoint-2: that run is past --steps 1")):
        with pytest.raises(SystemExit, match=line):
            call(monkeypatch, "--out", run, "--steps", 2, "--resume", *flags)
    for flags, line in ((["--resume", run / "checkpoint-7"], "--resume: there is no .*-7"),
                        (["--resume", "--out", tmp_path / "none"], "there is no checkpoint in"),
                        (["--out", run], "holds another run; choose another, or add --resume")):
        with pytest.raises(SystemExit, match=line):
            call(monkeypatch, *flags)
    assert [p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()] == before
    call(monkeypatch, "--out", run, "--resume", "--steps", 2)      # nothing is left to do
    assert len(metrics(run)) == 2


def test_a_resume_that_fails_takes_nothing_back(monkeypatch, tmp_path):
    """Rows and checkpoints after the step that --resume names go only when the run goes on."""
    run = tmp_path / "run"
    call(monkeypatch, "--out", run, "--steps", 3)
    path = run / "checkpoint-2/pytorch_model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(Exception, match="(?i)header|incomplete|buffer"):     # safetensors' own
        call(monkeypatch, "--resume", run / "checkpoint-2", "--steps", 3)
    assert len(metrics(run)) == 3 and len(checkpoint.checkpoints(run)) == 3


def test_a_row_that_a_crash_cut_off_is_no_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    assert checkpoint.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    checkpoint.rewind(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert checkpoint.read_rows(tmp_path / "absent.jsonl") == []


def test_no_code_in_a_pickle_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    torch.save({"step": 1, "args": Bomb()}, tmp_path / "trainer.pt")
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(Exception, match="[Ww]eights"):
        checkpoint.load_trainer(tmp_path, SimpleNamespace())
    with pytest.raises(Exception, match="[Ww]eights"):
        load_models("shapes", ckpt=tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------ not finite

def test_steps_that_are_not_finite_are_not_taken_and_end_the_run(monkeypatch, tmp_path, capsys):
    run, plain = tmp_path / "run", train.clipped_objective
    monkeypatch.setattr(train, "clipped_objective", lambda *a: plain(*a) * float("nan"))
    flags = ("--steps", 30, "--prompts-per-step", 2, "--unmask-steps", 2, "--micro-batch", 99)
    with pytest.raises(SystemExit, match="20 steps in a row were not taken .no score, or not "
                       f"finite.: go on from a checkpoint in {run}, with a smaller --lr"):
        call(monkeypatch, "--out", run, *flags)
    rows = metrics(run)
    assert [row["taken"] for row in rows] == [0] * 20 and rows[0]["grad_norm"] is None
    assert "NOT TAKEN" in capsys.readouterr().out
    assert checkpoint.checkpoints(run) == []                # nothing that was not a step

    monkeypatch.setattr(train, "clipped_objective", plain)
    shutil.rmtree(run)
    passes = []
    monkeypatch.setattr(train, "clipped_objective", lambda *a: passes.append(1) or plain(*a) * (
        float("inf") if len(passes) <= 4 else 1))
    call(monkeypatch, "--out", run, "--steps", 3)
    assert [row["taken"] for row in metrics(run)] == [0, 1, 1]
    assert [folder.name for folder in checkpoint.checkpoints(run)] == ["checkpoint-2",
                                                                       "checkpoint-3"]
    assert all(w.isfinite().all() for w in weights(run / "checkpoint-3").values())


def test_weights_that_are_not_finite_are_never_the_last_checkpoint(monkeypatch, tmp_path):
    run, plain = tmp_path / "run", train.update

    def update(step, examples, traj, adv, sound, args, showo, *rest):
        numbers = plain(step, examples, traj, adv, sound, args, showo, *rest)
        if step == 1:
            with torch.no_grad():
                showo.showo.lm_head.bias[:] = float("nan")
        return numbers
    monkeypatch.setattr(train, "update", update)
    call(monkeypatch, "--out", run, "--save-every", 3, "--steps", 6)
    assert [row["taken"] for row in metrics(run)] == [1, 1, 0, 0, 0, 0]
    assert checkpoint.checkpoints(run) == []


# ------------------------------------------------------------------------------ one run a folder

def test_a_folder_belongs_to_one_run_at_a_time(monkeypatch, tmp_path):
    run, plain, met = tmp_path / "run", train.sample_groups, []

    def sample_groups(*args):
        other = SimpleNamespace(model="shapes", seed=1, out=str(run), resume="auto")
        with pytest.raises(SystemExit, match="another run is in it; wait for it, or end it"):
            checkpoint.open_run(other, 0)
        met.append(1)
        return plain(*args)
    monkeypatch.setattr(train, "sample_groups", sample_groups)
    call(monkeypatch, "--out", run, "--steps", 1)
    assert met
    with FileLock(run / "lock").acquire(timeout=0):         # given back
        for flags in (["--out", run, "--resume"], ["--resume", run / "checkpoint-1"]):
            with pytest.raises(SystemExit, match="another run is in it"):
                call(monkeypatch, *flags, "--steps", 2)
    call(monkeypatch, "--out", run, "--resume", "--steps", 2)


# ------------------------------------------------------------------------------ the script

PHASES = {b"r": (train, "sample_groups"), b"u": (train, "update"), b"s": (checkpoint, "save")}
FLAGS = ("--model shapes --no-kl --filter-low --steps 12 --prompts-per-step 3 --reward geneval "
         "--group-size 4 --unmask-steps 2 --eval-every 0 --save-every 1 --keep-last 2 --lr 1e-3"
         ).split()


def announced(function, pipe, letter):
    """Return a function that writes a letter to a pipe before it does what it did."""
    def call(*args):
        os.write(pipe, letter)
        return function(*args)
    return call


def start(out, *flags):
    """Start train.py in a child -> its process id, and a pipe with a letter for every phase that
    begins. No thread is ever started in this process, so that fork() is safe."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    for letter, (module, name) in PHASES.items():
        setattr(module, name, announced(getattr(module, name), write, letter))
    sys.stdout = open(os.devnull, "w")
    sys.argv = ["train.py", *FLAGS, "--out", str(out), *flags]
    try:
        common.run(train.main)
    except BaseException as error:      # SystemExit too
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def finish(child, pipe):
    """Wait for a run's end -> the usual seconds of each phase, by its letter."""
    seconds, letter, since = {}, b"", 0.0
    while begins := os.read(pipe, 1):
        seconds.setdefault(letter, []).append(time.monotonic() - since)
        letter, since = begins, time.monotonic()
    os.close(pipe)
    assert os.waitpid(child, 0)[1] == 0
    return {letter: statistics.median(times) for letter, times in seconds.items()}


def kill(child, pipe, letter, n, delay):
    """Kill a run so many seconds after a phase has begun for the n-th time."""
    while n:
        begins = os.read(pipe, 1)
        assert begins, "it ended before it was killed"
        n -= begins == letter
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    os.close(pipe)


def main(out):
    """Print the step of the last checkpoint after every kill."""
    straight, killed = out / "straight", out / "killed"
    dice, begun = random.Random(0), []
    seconds = finish(*start(straight))
    for i in range(4):
        letter = list(PHASES)[i % 3]
        child, pipe = start(killed, *(["--resume"] if i else []))
        kill(child, pipe, letter, dice.choice([1, 2]), dice.uniform(0, seconds[letter]))
        folders = checkpoint.checkpoints(killed)
        for folder in folders:          # one that has its name is whole
            trainer(folder)
            load_showo(folder)
        begun.append(int(folders[-1].name[11:]) if folders else 0)
    finish(*start(killed, "--resume"))
    print(json.dumps(begun))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
