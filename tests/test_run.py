"""A run's folder: saved, resumed, stopped, logged. What was saved is whole, whatever happens, and
a run goes on bit by bit the same.

Started as a script, test_run.py OUT: a run of train.py that is killed (SIGKILL) four times, in
rollout, update and saving by turns, each time at a random moment, and continued with --resume;
beside it the same run in one piece."""
import errno
import fcntl
import gc
import json
import math
import os
import random
import re
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
from filelock import FileLock
from helpers import DATA, TINY, call, equal, metrics, moments, trainer, weights
from PIL import Image

import train
from model import load_showo
from support import processes
from support import run as runs

FOUR = ("--steps", 4)


def same(a, b):
    """Demand the same steps and, at the end, the same weights and optimizer, bit by bit."""
    assert metrics(a) == metrics(b)
    x, y = (runs.checkpoints(out)[-1] for out in (a, b))
    assert x.name == y.name and equal(weights(x), weights(y)) and equal(moments(x), moments(y))
    x, y = trainer(x), trainer(y)
    assert x["filter"] == y["filter"] and x["step"] == y["step"] and equal(x["lora"], y["lora"])
    assert x["optimizer"]["param_groups"] == y["optimizer"]["param_groups"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run of four steps that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    call(*FOUR, "--save-every", 2, "--out", out)
    return out


@pytest.mark.parametrize("flags", [
    ("--filter-low", "--inner-epochs", 2), ("--kl", "--transition", "p1"),
    ("--kl", "--lora", 2, "--ratio", "mean"),
    ("--transition", "ar", "--unmask-steps", 4, "--loss-steps", 2, "--loss-steps-from", "random")])
def test_a_resumed_run_is_the_run(monkeypatch, tmp_path, flags):
    monkeypatch.setattr(train.SampleFilter, "bar", property(lambda own: 0.3))
    straight, again = tmp_path / "straight", tmp_path / "again"
    call(*FOUR, "--out", straight, "--save-every", 2, *flags)
    shutil.copytree(straight, again, ignore=lambda *_: ["checkpoint-4"])
    call(*FOUR, "--out", again, "--save-every", 2, "--resume", *flags)
    same(straight, again)
    assert not equal(*(weights(straight / f"checkpoint-{step}") for step in (2, 4)))
    assert len(metrics(again)) == 4
    assert any(row["resampled"] for row in metrics(straight)) == ("--filter-low" in flags)


def test_going_back_to_a_checkpoint_keeps_the_later_ones(tmp_path):
    run = tmp_path / "run"
    call("--out", run, "--steps", 3)
    rows, last = metrics(run), weights(run / "checkpoint-3")
    call("--resume", run / "checkpoint-2", "--steps", 3)
    assert metrics(run) == rows and equal(weights(run / "checkpoint-3"), last)
    kept = [folder.name.split("-")[1] for folder in run.glob("checkpoint-*.replaced-*")]
    assert kept == ["3.replaced"]
    for folder in runs.checkpoints(run):      # weights of all, the optimizer of two
        assert (folder / "optimizer.pt").exists() == (folder.name != "checkpoint-1")
        load_showo(folder)
    with pytest.raises(SystemExit, match="only the newest two checkpoints keep the optimizer's"
                       " state; begin anew from its weights, with --ckpt .*checkpoint-1"):
        call("--resume", run / "checkpoint-1", "--steps", 3)
    gc.collect()
    call("--out", tmp_path / "other", "--steps", 3, "--seed", 43)
    assert metrics(tmp_path / "other") != rows


def test_killed_four_times_it_is_still_the_same_run(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = json.loads(done.stdout)
    assert len(steps) == 4 and steps == sorted(steps) and 0 < steps[-1] < 9
    same(tmp_path / "straight", tmp_path / "killed")
    assert len(runs.checkpoints(tmp_path / "killed")) == 2        # --keep-last
    assert not list((tmp_path / "killed").glob(".*"))


def test_a_run_stopped_before_it_saved_begins_again(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "save", lambda *_: None)
    call("--out", tmp_path / "run")
    rows = metrics(tmp_path / "run")
    call("--out", tmp_path / "run", "--resume")
    assert len(rows) == 2 and metrics(tmp_path / "run") == rows


def test_a_weight_decay_that_is_given_now_holds(straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    call(*FOUR, "--resume", run / "checkpoint-2", "--weight-decay", 5.0)
    norms = [sum(w.norm() for w in weights(out / "checkpoint-4").values())
             for out in (run, straight)]
    assert norms[0] < 0.9999 * norms[1]


def test_what_a_resume_must_not_change(straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    before = [path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()]
    for flags, line in ((["--group-size", 8], "that run has --group-size 4; give the same"),
                        (["--kl", "--seed", 1], "that run has --kl False, --seed 42; give"),
                        (["--steps", 1], "checkpoint-4: that run is past --steps 1")):
        with pytest.raises(SystemExit, match=line):
            call(*FOUR, "--out", run, "--resume", *flags)
    for flags, line in ((["--resume", run / "checkpoint-7"], "--resume: there is no .*-7"),
                        (["--out", run], "holds another run; choose another folder, or go")):
        with pytest.raises(SystemExit, match=line):
            call(*flags)
    assert [p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()] == before
    call(*FOUR, "--out", run, "--resume")       # nothing is left to do
    assert len(metrics(run)) == 4
    # rows and checkpoints after the step that --resume names go only when the run goes on
    path = run / "checkpoint-2/pytorch_model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(Exception, match="(?i)header|incomplete|buffer"):     # safetensors' own
        call(*FOUR, "--resume", run / "checkpoint-2")
    assert len(metrics(run)) == 4 and len(runs.checkpoints(run)) == 2


def test_a_row_that_a_crash_cut_off_is_no_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    assert runs.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    runs.rewind(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert runs.read_rows(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_signals_stop_at_a_step_boundary_and_the_run_goes_on(
        straight, monkeypatch, tmp_path, capsys, number):
    flags, steps, plain = (*FOUR, "--save-every", 0), [], train.update

    def update(groups, *rest):
        steps.append(groups.keys[0][1])
        if steps[-1] == 1:
            os.kill(os.getpid(), number)
        return plain(groups, *rest)
    monkeypatch.setattr(train, "update", update)
    with pytest.raises(SystemExit) as end:
        call("--out", tmp_path / "run", *flags)
    assert end.value.code == 128 + number
    del end
    gc.collect()            # its lock goes with it
    assert steps == [0, 1] and "stopped by a signal after step 2" in capsys.readouterr().out

    monkeypatch.setattr(train, "update", plain)
    call("--out", tmp_path / "run", "--resume", *flags)
    same(straight, tmp_path / "run")


def test_a_second_signal_ends_at_once(monkeypatch):
    clock, ended = SimpleNamespace(now=100.0, monotonic=lambda: clock.now), []
    monkeypatch.setattr(runs, "time", clock)
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    stop = runs.StopSignal()
    assert not stop.number
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM and ended == []
    for clock.now in (100.0, 100.9):                # the same one, passed on by torchrun
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == []
    clock.now = 101.1
    os.kill(os.getpid(), signal.SIGINT)
    assert ended == [128 + signal.SIGINT]


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP is under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = runs.StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.number and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_folder_belongs_to_one_run_at_a_time(monkeypatch, tmp_path):
    run, plain, met = tmp_path / "run", train.sample_groups, []

    def sample_groups(*args):
        other = SimpleNamespace(model="shapes", seed=1, out=str(run), resume="auto")
        with pytest.raises(SystemExit, match="another run is in it; wait for it, or end it"):
            runs.open_run(other)
        met.append(1)
        return plain(*args)
    monkeypatch.setattr(train, "sample_groups", sample_groups)
    call("--out", run, "--steps", 1)
    assert met
    with FileLock(run / "lock").acquire(timeout=0):         # given back
        for flags in (["--out", run, "--resume"], ["--resume", run / "checkpoint-1"]):
            with pytest.raises(SystemExit, match="another run is in it"):
                call(*flags)
    call("--out", run, "--resume")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_obstacle(monkeypatch, tmp_path, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", flock)
    call("--steps", 1, "--out", tmp_path / "run")
    assert capsys.readouterr().err.count("WARNING: ") == 1 and metrics(tmp_path / "run")


def test_each_run_has_its_own_folder_with_its_seed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for seed in (42, 43):
        call("--steps", 1, "--save-every", 0, "--seed", seed)
    first, second = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert re.match(r"shapes-seed42-\d+-\d+-\d+$", first) and second.startswith("shapes-seed43-")


ROW = {"step": 3, "reward_mean": 0.5, "adv_zero": 0.25, "ratio_mean": 1.0, "ratio_max": 1.0,
       "approx_kl": 0.0, "kl_ref": 0.0, "clip_fraction": 0.0, "grad_norm": 0.125, "entropy": 2.0,
       "lr": 1e-3, "images_per_s": 12.0, "taken": 1}


def log(out):
    return runs.Log(out, {"steps": 4, "wandb": None}, 2)


def lines_of(path):
    """Return the rows of a file, which must be JSON to the letter: without NaN."""
    def refuse(name):
        pytest.fail(f"{name} is no JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_the_log_writes_a_row_and_says_a_line(tmp_path, capsys):
    own = log(tmp_path)
    own.step(ROW)
    own.step({**ROW, "step": 4, "grad_norm": math.nan, "reward_mean": -math.inf, "taken": 0})
    own.evaluation({"step": 4, "overall": 0.25, "colors": 1.0})
    nulls = {**ROW, "step": 4, "grad_norm": None, "reward_mean": None, "taken": 0}
    assert lines_of(tmp_path / "metrics.jsonl") == [ROW, nulls]
    assert lines_of(tmp_path / "eval.jsonl") == [{"step": 4, "overall": 0.25, "colors": 1.0}]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("    3/4 | reward 0.500 zero-adv 0.25 ratio 1.000 kl 0.0e+00 clip 0.00 "
                       "grad 0.12 entropy 2.00 lr 1.0e-03 | 12.0 img/s")
    assert said[1].endswith("NOT TAKEN: not finite")
    assert said[2] == "eval step 4 overall 0.25 colors 1"


def test_other_processes_log_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runs, "rank", lambda: 1)
    own = log(tmp_path)
    own.step({**ROW, "taken": 0})
    own.evaluation({"step": 3, "overall": 0.0})
    own.say("hello")
    said = capsys.readouterr()
    assert said.out == said.err == "" and list(tmp_path.iterdir()) == []


def test_the_first_grid_is_put_above_the_last(tmp_path):
    (tmp_path / "samples").mkdir()
    own = log(tmp_path)
    own.close()
    for step, colour in ((0, "red"), (5, "green"), (12, "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"samples/step-{step:06d}.png")
    own.close()
    both = Image.open(tmp_path / "samples/before_after.png")
    assert both.size == (20, 28)
    assert both.getpixel((5, 5)) == (255, 0, 0) and both.getpixel((5, 25)) == (0, 0, 255)


def test_wandb_goes_on_with_the_same_run(monkeypatch, tmp_path):
    begun, sent = [], []

    def init(**settings):
        begun.append(settings)
        return SimpleNamespace(id=settings["id"] or "x1", finish=lambda: None,
                               log=lambda values, step: sent.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=init, Image=lambda path: ("picture", path)))
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: name)
    run = tmp_path / "run"
    flags = ("--wandb", "project", "--eval-every", 2, "--eval-unmask-steps", 2, "--out", run,
             "--eval-prompts", DATA / "eval.jsonl")
    call(*flags)
    shutil.rmtree(run / "checkpoint-2")     # as if it had ended before it saved
    before = list(sent)
    call(*flags, "--resume", "--steps", 3)
    assert [settings["id"] for settings in begun] == [None, "x1"]
    assert begun[0]["dir"] == run and begun[0]["resume"] == "allow"
    assert [step for step, _ in before] == [0, 1, 2, 2]
    assert [step for step, _ in sent[len(before):]] == [3, 3]       # 2 is not sent again
    name, picture = next(values for step, values in sent if step == 0)["eval/grid"]
    assert name == "picture" and os.path.exists(picture)


PHASES = {b"r": (train, "sample_groups"), b"u": (train, "update"), b"s": (runs, "save")}
FLAGS = (*TINY, *"--filter-low --steps 9 --reward geneval --keep-last 2".split())


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
        processes.run(train.main)
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
    torch.optim.AdamW(load_showo("shapes").parameters())        # imports what all children need
    dice, begun = random.Random(0), []
    seconds = finish(*start(straight))
    for i in range(4):
        letter = list(PHASES)[i % 3]
        child, pipe = start(killed, *(["--resume"] if i else []))
        kill(child, pipe, letter, dice.choice([1, 2]), dice.uniform(0, seconds[letter]))
        folders = runs.checkpoints(killed)
        for folder in folders:          # one that has its name is whole
            trainer(folder)
            load_showo(folder)
        begun.append(int(folders[-1].name[11:]) if folders else 0)
    finish(*start(killed, "--resume"))
    print(json.dumps(begun))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
