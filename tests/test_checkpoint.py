"""Saving, resuming, stopping: what was saved is whole or passed over, whatever happens, and a run
goes on bit by bit the same.

Started as a script, test_checkpoint.py OUT: a run of train.py that is killed (SIGKILL) 20 times, in
rollout, update and saving by turns, each time at a random moment, and continued with --resume;
beside it the same run in one piece."""
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, metrics
from safetensors.torch import load_file

import checkpoint
import common
import train
from checkpoint import InputError
from model import load_models, load_showo

TINY = ("--model shapes --no-kl --steps 4 --prompts-per-step 4 --group-size 4 --unmask-steps 4 "
        "--eval-every 0 --sample-every 0 --save-every 1 --lr 1e-3").split()


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *map(str, flags)])
    train.main()


def weights(folder):
    return load_file(folder / "pytorch_model.safetensors")


def equal(a, b):
    """Return whether two dicts hold the same tensors, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(a, b):
    """Demand the same steps and, at the end, the same weights and optimizer, bit by bit."""
    assert metrics(a) == metrics(b)
    x, y = (checkpoint.checkpoints(out)[-1] for out in (a, b))
    assert x.name == y.name and equal(weights(x), weights(y))
    x, y = (checkpoint.read_trainer(folder) for folder in (x, y))
    assert x["filter"] == y["filter"] and x["step"] == y["step"] and x["n_bad"] == y["n_bad"]
    x, y = x["optimizer"], y["optimizer"]
    assert x["param_groups"] == y["param_groups"] and x["state"].keys() == y["state"].keys()
    for index, moments in x["state"].items():
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert equal(moments, y["state"][index])


def is_whole(folder):
    """Return whether a checkpoint can be read, all of it."""
    try:
        checkpoint.read_trainer(folder)
        load_showo(folder)
    except InputError:
        return False
    return True


def truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def empty(path):
    os.truncate(path, 0)


# ------------------------------------------------------------------------------ the same run

def test_a_seed_fixes_everything_and_a_resumed_run_is_the_run(monkeypatch, tmp_path):
    flags = ("--filter-low", "--filter-warmup", 4, "--max-resample", 2, "--inner-epochs", 2,
             "--steps", 6, "--save-every", 3, "--prompts-per-step", 4)
    straight, again = tmp_path / "straight", tmp_path / "again"
    call(monkeypatch, "--out", straight, *flags)
    call(monkeypatch, "--out", again, *flags)
    same(straight, again)

    auto = shutil.copytree(straight, tmp_path / "auto", ignore=lambda *_: ["checkpoint-6"])
    call(monkeypatch, "--out", auto, "--resume", *flags)
    same(straight, auto)

    call(monkeypatch, "--resume", again / "checkpoint-3", *flags)
    same(straight, again)
    kept = sorted(folder.name for folder in again.glob("checkpoint-6*"))
    assert kept == ["checkpoint-6", "checkpoint-6.replaced"]                # not lost
    assert equal(weights(again / "checkpoint-6.replaced"), weights(straight / "checkpoint-6"))
    assert checkpoint.read_trainer(again / "checkpoint-6")["filter"]["history"]

    call(monkeypatch, "--out", tmp_path / "other", *flags, "--seed", 43)
    assert metrics(tmp_path / "other") != metrics(straight)


def test_killed_twenty_times_it_is_still_the_same_run(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, torn = json.loads(done.stdout)
    assert len(steps) == 20 and steps == sorted(steps) and 5 < steps[-1] < 24
    assert torn > 0                                     # some were killed while they saved
    same(tmp_path / "straight", tmp_path / "killed")
    assert len(checkpoint.checkpoints(tmp_path / "killed")) == 2
    assert not list((tmp_path / "killed").glob(".*"))


def test_signals_stop_at_a_step_boundary_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
    flags = ("--save-every", 0)
    call(monkeypatch, "--out", tmp_path / "straight", *flags)
    assert "ALARM" not in capsys.readouterr().out
    plain, steps = train.update, []

    def update(step, *rest):
        steps.append(step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(step, *rest)
    monkeypatch.setattr(train, "update", update)
    call(monkeypatch, "--out", tmp_path / "run", *flags)
    said = capsys.readouterr().out
    assert steps == [0, 1] and "stopped after step 2, as a signal asked; continue with" in said

    monkeypatch.setattr(train, "update", plain)
    call(monkeypatch, "--out", tmp_path / "run", "--resume", *flags)
    assert "notice: changed" not in capsys.readouterr().out
    same(tmp_path / "straight", tmp_path / "run")


def test_a_run_stopped_before_it_saved_begins_again(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    examples = train.shapes.prompts("eval")[::21]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(x) + "\n" for x in examples))
    flags = ("--out", tmp_path / "run", "--eval-every", 2, "--eval-n", 1, "--eval-unmask-steps", 4,
             "--eval-prompts", tmp_path / "few.jsonl")
    call(monkeypatch, *flags)
    rows, evals = metrics(tmp_path / "run"), (tmp_path / "run/eval.jsonl").read_text()
    assert len(rows) == 4 and len(evals.splitlines()) == 3
    call(monkeypatch, *flags, "--resume")
    assert metrics(tmp_path / "run") == rows
    assert (tmp_path / "run/eval.jsonl").read_text() == evals


def test_the_saved_state_does_not_depend_on_when_it_was_saved(monkeypatch, tmp_path):
    """Also when the first steps are skipped, so that the optimizer has no state yet."""
    plain, passes = train.clipped_objective, []

    def objective(*args):
        passes.append(1)
        return plain(*args) * (float("nan") if len(passes) < 3 else 1)
    monkeypatch.setattr(train, "clipped_objective", objective)
    for name, every in (("often", 1), ("once", 0)):
        passes.clear()
        call(monkeypatch, "--out", tmp_path / name, "--save-every", every)
    assert metrics(tmp_path / "once")[0]["skipped"] == 1
    same(tmp_path / "often", tmp_path / "once")

    # and goes on from a state of nothing
    passes.clear()
    call(monkeypatch, "--out", tmp_path / "begun", "--steps", 1)
    assert checkpoint.read_trainer(tmp_path / "begun/checkpoint-1")["optimizer"]["state"] == {}
    resumed = shutil.copytree(tmp_path / "often", tmp_path / "resumed",
                              ignore=lambda *_: [f"checkpoint-{i}" for i in (2, 3, 4)])
    call(monkeypatch, "--out", resumed, "--resume")
    same(tmp_path / "often", resumed)


def test_a_weight_decay_that_is_given_now_holds(monkeypatch, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    call(monkeypatch, "--out", run, "--steps", 4, "--save-every", 2)
    shutil.copytree(run, other)
    capsys.readouterr()
    call(monkeypatch, "--resume", run / "checkpoint-2", "--weight-decay", 5.0)
    lines = capsys.readouterr().out.splitlines()
    assert "notice: changed since that checkpoint: weight_decay 0.0 -> 5.0" in lines
    norms = [sum(w.norm() for w in weights(out / "checkpoint-4").values()) for out in (run, other)]
    assert norms[0] < 0.9999 * norms[1]


def test_a_run_past_the_last_step_is_said(monkeypatch, tmp_path):
    call(monkeypatch, "--out", tmp_path / "run", "--steps", 2)
    with pytest.raises(InputError, match="checkpoint-2: that run is past --steps 1"):
        call(monkeypatch, "--out", tmp_path / "run", "--resume", "--steps", 1)
    before = weights(tmp_path / "run/checkpoint-2")
    call(monkeypatch, "--out", tmp_path / "run", "--resume", "--steps", 2)     # nothing is left
    assert len(metrics(tmp_path / "run")) == 2
    assert equal(weights(tmp_path / "run/checkpoint-2"), before)


# ------------------------------------------------------------------------------ damage

def test_damaged_checkpoints_are_passed_over_and_old_ones_dropped(monkeypatch, tmp_path, capsys):
    run, flags = tmp_path / "run", ("--keep-last", 3)
    call(monkeypatch, "--out", run, *flags)
    names = [folder.name for folder in checkpoint.checkpoints(run)]
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]

    shutil.copytree(run, tmp_path / "straight")
    truncate(run / "checkpoint-4/pytorch_model.safetensors")
    (run / "checkpoint-3/trainer.pt").unlink()
    call(monkeypatch, "--out", run, "--resume", *flags)
    said = capsys.readouterr().err
    assert re.search("passing over checkpoint-4: .*pytorch_model.safetensors: cannot be read", said)
    assert re.search("passing over checkpoint-3: .*no trainer.pt there", said)
    same(run, tmp_path / "straight")
    assert all(is_whole(folder) for folder in checkpoint.checkpoints(run))
    assert [folder.name for folder in checkpoint.checkpoints(run)] == names

    for folder in checkpoint.checkpoints(run):
        empty(folder / "trainer.pt")
    with pytest.raises(InputError, match=f"no checkpoint in {run} is whole"):
        call(monkeypatch, "--out", run, "--resume", *flags)
    assert metrics(run) == metrics(tmp_path / "straight")
    with pytest.raises(InputError, match="checkpoint-4/trainer.pt: cannot be read"):
        call(monkeypatch, "--resume", run / "checkpoint-4", *flags)
    (run / "checkpoint-4/trainer.pt").unlink()
    with pytest.raises(InputError, match="checkpoint-4: no checkpoint of train.py"):
        call(monkeypatch, "--resume", run / "checkpoint-4", *flags)
    assert metrics(run) == metrics(tmp_path / "straight")


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """A folder like a run's, with checkpoints after steps 1 and 2."""
    out, showo = tmp_path_factory.mktemp("saved") / "run", load_showo("shapes")
    out.mkdir()
    optimizer = torch.optim.AdamW(showo.parameters())
    for step in (1, 2):
        checkpoint.save(out / f"checkpoint-{step}", showo, trainer_of(step, optimizer))
    (out / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 4)))
    (out / "eval.jsonl").write_text('{"step": 0}\n{"step": 2}\n{"step": 4}\n')
    return out


def trainer_of(step, optimizer):
    """Return what trainer.pt of a checkpoint holds."""
    saved = {"step": step, "world": 1, "n_bad": 0, "args": {}, "filter": {"history": []}}
    return saved | {"optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("name", ["trainer.pt", "pytorch_model.safetensors", "config.json"])
@pytest.mark.parametrize("harm", [truncate, empty, os.unlink])
def test_a_file_that_cannot_be_read_is_passed_over(run_of_two, tmp_path, capsys, name, harm):
    run = shutil.copytree(run_of_two, tmp_path / "run")
    assert checkpoint.newest(run) == run / "checkpoint-2" and capsys.readouterr().err == ""
    harm(run / "checkpoint-2" / name)
    assert checkpoint.newest(run) == run / "checkpoint-1"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("--resume: passing over checkpoint-2: ")
    harm(run / "checkpoint-1" / name)
    with pytest.raises(InputError, match=f"no checkpoint in {run} is whole"):
        checkpoint.newest(run)


@pytest.mark.parametrize("content", [
    [], {}, {"step": 1}, {"step": True, "world": 1, "n_bad": 0, "args": {}, "filter": {},
                          "optimizer": {}}])
def test_a_trainer_that_train_did_not_write_is_said(tmp_path, content):
    torch.save(content, tmp_path / "trainer.pt")
    with pytest.raises(InputError, match="trainer.pt: was not written by train.py"):
        checkpoint.read_trainer(tmp_path)


def another_shape(saved):
    saved["optimizer"]["state"][1]["exp_avg"] = torch.zeros(3)


def no_moments(saved):
    del saved["optimizer"]["state"][1]["exp_avg_sq"]


def one_parameter_less(saved):
    saved["optimizer"]["param_groups"][0]["params"].pop()


def one_parameter_more(saved):
    saved["optimizer"]["state"][9] = saved["optimizer"]["state"][1]


def no_group(saved):
    saved["optimizer"]["param_groups"] = []


def no_history(saved):
    del saved["filter"]["history"]


@pytest.mark.parametrize("harm", [another_shape, no_moments, one_parameter_less, one_parameter_more,
                                  no_group, no_history])
def test_a_state_that_does_not_fit_is_said(harm):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    assert checkpoint.check_state(trainer_of(1, optimizer), optimizer) is None      # no step yet
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    saved = trainer_of(1, optimizer)
    assert checkpoint.check_state(saved, torch.optim.AdamW(model.parameters())) is None
    harm(saved)
    with pytest.raises(InputError, match="--resume: the optimizer or the filter in trainer.pt does "
                       "not fit"):
        checkpoint.check_state(saved, torch.optim.AdamW(model.parameters()))


def test_a_resume_that_fails_takes_nothing_back(monkeypatch, tmp_path):
    """Rows and checkpoints after the step that --resume names go only when the run goes on."""
    run = tmp_path / "run"
    call(monkeypatch, "--out", run, "--steps", 3)
    truncate(run / "checkpoint-1/pytorch_model.safetensors")
    with pytest.raises(InputError, match="pytorch_model.safetensors: cannot be read as a weights"):
        call(monkeypatch, "--resume", run / "checkpoint-1", "--steps", 3)
    assert len(metrics(run)) == 3
    assert [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(run)] == [1, 2, 3]


def test_rewinding_deletes_rows_and_grids_and_renames_checkpoints(run_of_two, tmp_path):
    run = shutil.copytree(run_of_two, tmp_path / "run")
    (run / "samples").mkdir()
    for name in ("step-000000", "step-000001", "step-000002", "before_after", "step-mine"):
        (run / f"samples/{name}.png").touch()
    (run / "checkpoint-2.replaced").mkdir()                     # of a time before
    (run / "checkpoint-2.replaced/old").touch()
    checkpoint.rewind(run, 1)
    assert [row["step"] for row in checkpoint.read_rows(run / "metrics.jsonl")] == [1]
    assert [row["step"] for row in checkpoint.read_rows(run / "eval.jsonl")] == [0]
    assert checkpoint.checkpoints(run) == [run / "checkpoint-1"]
    assert is_whole(run / "checkpoint-2.replaced")
    assert not (run / "checkpoint-2.replaced/old").exists()
    left = sorted(picture.stem for picture in (run / "samples").iterdir())
    assert left == ["before_after", "step-000000", "step-000001", "step-mine"]
    assert not list(run.glob(".*"))


def test_a_bad_row_stops_a_resume_before_it_changes_anything(run_of_two, tmp_path):
    run = shutil.copytree(run_of_two, tmp_path / "run")
    good = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(good + '{"step": 4, "rew')       # cut off by a crash
    assert [row["step"] for row in checkpoint.read_rows(run / "metrics.jsonl")] == [1, 2, 3]
    for line, message in (("not json", "line 2 is not JSON"), ("[1]", "line 2 is no row"),
                          ('{"step": true}', "line 2 is no row"), ('{"step": 1.0}', "is no row"),
                          ("{}", "line 2 is no row")):
        (run / "eval.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(InputError, match=f"eval.jsonl: .*{message}"):
            checkpoint.rewind(run, 1)
        assert (run / "metrics.jsonl").read_text() == good + '{"step": 4, "rew'
        assert len(checkpoint.checkpoints(run)) == 2
    assert checkpoint.read_rows(run / "absent.jsonl") == []


def test_no_code_in_a_pickle_runs(run_of_two, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    run = shutil.copytree(run_of_two, tmp_path / "run")
    torch.save({"step": 1, "args": Bomb()}, run / "checkpoint-1/trainer.pt")
    with pytest.raises(InputError, match="trainer.pt: cannot be read"):
        checkpoint.read_trainer(run / "checkpoint-1")
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(InputError, match="bomb.pth: cannot be read as a weights file"):
        load_models("shapes", ckpt=tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------ saving

@pytest.fixture
def file_limit():
    """Set the largest size of a file, which stands for a full disk: writing fails alike."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit, file", [(1_000_000, "weights"), (5_000_000, "trainer.pt")])
def test_a_disk_that_takes_no_more_keeps_what_was_saved(monkeypatch, tmp_path, capsys, file_limit,
                                                        limit, file):
    run = tmp_path / "run"
    call(monkeypatch, "--out", run, "--steps", 1)
    sizes = {"weights": (run / "checkpoint-1/pytorch_model.safetensors").stat().st_size,
             "trainer.pt": (run / "checkpoint-1/trainer.pt").stat().st_size}
    assert [name for name, size in sizes.items() if size > limit][0] == file
    file_limit(limit)
    argv = ["train.py", *TINY, "--out", str(run), "--steps", "2", "--resume"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        common.run(train.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    assert re.search(r"checkpoint-2: cannot be saved .*checkpoint-1 is whole; make room",
                     said.splitlines()[-1])
    assert [folder.name for folder in run.glob("*checkpoint*")] == ["checkpoint-1"]
    assert is_whole(run / "checkpoint-1")


def test_saving_again_keeps_what_was_there_and_drops_old_ones(run_of_two, tmp_path, base):
    run, (showo, _) = shutil.copytree(run_of_two, tmp_path / "run"), base
    optimizer = torch.optim.AdamW(showo.parameters())
    (run / ".checkpoint-7").mkdir()                             # of a process that was killed
    (run / "checkpoint-9").mkdir()
    (run / "checkpoint-x").mkdir()
    checkpoint.save(run / "checkpoint-2", showo, trainer_of(2, optimizer), keep_last=1)
    names = sorted(folder.name for folder in run.glob("*checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-2.replaced", "checkpoint-9", "checkpoint-x"]
    assert is_whole(run / "checkpoint-2") and is_whole(run / "checkpoint-2.replaced")
    assert checkpoint.last_one(run) == f"{run / 'checkpoint-9'} is whole"
    assert checkpoint.last_one(tmp_path) == "none was saved before"


# ------------------------------------------------------------------------------ not finite

def test_gradients_that_are_not_finite_are_skipped_and_end_the_run(monkeypatch, tmp_path, capsys):
    run, plain, flags = tmp_path / "run", train.clipped_objective, ("--unmask-steps", 8)
    monkeypatch.setattr(train, "clipped_objective", lambda *a: plain(*a) * float("nan"))
    message = (f"^2 steps had something that is not finite; look.*; saved: {run}/checkpoint-2, "
               f"continue with --resume --out {run}$")
    with pytest.raises(InputError, match=message):
        call(monkeypatch, "--out", run, "--max-bad-steps", 2, "--save-every", 0, *flags)
    rows = metrics(run)
    assert [row["skipped"] for row in rows] == [1, 1] and rows[0]["grad_norm"] is None
    assert len(rows[0]["bad_prompts"]) > 1                      # every prompt of the pass
    assert "step 1 skipped" in capsys.readouterr().out
    assert equal(weights(run / "checkpoint-2"), weights(ROOT / "shapes"))

    monkeypatch.setattr(train, "clipped_objective", plain)
    call(monkeypatch, "--out", run, "--max-bad-steps", 3, "--resume", *flags)
    assert [row["skipped"] for row in metrics(run)] == [1, 1, 0, 0]
    assert checkpoint.read_trainer(run / "checkpoint-4")["n_bad"] == 2      # all of the run's


def test_log_probabilities_that_are_not_finite_are_logged_with_their_prompt(monkeypatch, tmp_path):
    log_prob, collect, batches = train.transition_log_prob, train.collect, []

    def spoilt(*move, **more):
        out = log_prob(*move, **more)
        return out * torch.where(torch.arange(len(out)) == 5, float("inf"), 1)

    def collected(*args):
        batch, n_resampled = collect(*args)
        batches.append(batch)
        return batch, n_resampled
    monkeypatch.setattr(train, "transition_log_prob", spoilt)
    monkeypatch.setattr(train, "collect", collected)
    call(monkeypatch, "--out", tmp_path / "run", "--steps", 1, "--unmask-steps", 8)
    row, = metrics(tmp_path / "run")
    batch, = batches
    used = train.group_advantages(batch.rewards).flatten().nonzero()[:, 0]
    assert row["skipped"] == 1
    assert row["bad_prompts"] == [batch.examples[used[5] // 4]["prompt"]]


def test_a_policy_that_is_not_finite_is_not_saved(monkeypatch, tmp_path):
    run, plain, harm = tmp_path / "run", train.update, []

    def update(step, batch, args, showo, reference, optimizer):
        numbers = plain(step, batch, args, showo, reference, optimizer)
        if step == 1:
            harm[0](showo)
        return numbers

    def infinite(showo):
        """Harm a parameter that no rollout reads."""
        with torch.no_grad():
            showo.showo.model.embed_tokens.weight[7] = float("inf")

    def too_large(showo):
        """Leave parameters finite, but not what they make."""
        with torch.no_grad():
            showo.showo.lm_head.weight[:] = 1e38
    monkeypatch.setattr(train, "update", update)
    for harm[:] in ([infinite], [too_large]):
        shutil.rmtree(run, ignore_errors=True)
        with pytest.raises(InputError, match="^the policy after step 2 is not finite and is not "
                           f"saved; {run}/checkpoint-1 is whole: go back with --resume"):
            call(monkeypatch, "--out", run)
        assert checkpoint.checkpoints(run) == [run / "checkpoint-1"]
        checkpoint.Lock(run).acquire()                          # given back


def test_processes_that_drift_apart_are_named(monkeypatch, tmp_path):
    """Against process 0, down to the last bit; a checkpoint is not written then."""
    sums = []

    def all_cat(own):
        sums.append(own.item())
        return own.repeat(5) + torch.tensor([0, 1, 0, 1, 0])
    monkeypatch.setattr(train, "all_cat", all_cat)
    args = SimpleNamespace(unmask_steps=4, zero=False, keep_last=0)
    showo = load_showo("shapes")
    bias = showo.showo.lm_head.bias.data
    for _ in range(2):
        with pytest.raises(InputError, match="^process 1, 3 of 5 no longer holds the parameters of "
                           "process 0; "):
            train.save_checkpoint(3, tmp_path, args, showo, None, None, 0)
        bias[3] = torch.nextafter(bias[3], torch.tensor(9.0))
    assert sums[1] - sums[0] in (-1, 1)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ one run a folder

def owner(out):
    return json.loads((out / "lock.json").read_text())


def test_a_folder_belongs_to_one_run_at_a_time(monkeypatch, tmp_path):
    run, plain, met = tmp_path / "run", train.collect, []

    def collect(*args):
        assert owner(run)["pid"] == os.getpid() and owner(run)["host"] == socket.gethostname()
        with pytest.raises(InputError, match="another run is there .*; wait for it, or end it"):
            checkpoint.Lock(run).acquire()
        met.append(1)
        return plain(*args)
    monkeypatch.setattr(train, "collect", collect)
    call(monkeypatch, "--out", run, "--steps", 2)
    assert len(met) == 2 and (run / "lock.json").read_text() == ""
    lock = checkpoint.Lock(run)
    lock.acquire()
    lock.acquire()                                              # it has it already

    rows = (run / "metrics.jsonl").read_text()
    for flags in (["--out", run], ["--out", run, "--resume"], ["--resume", run / "checkpoint-1"]):
        with pytest.raises(InputError, match=f"^--out {run}: another run is there"):
            call(monkeypatch, *flags, "--steps", 2)
    assert (run / "metrics.jsonl").read_text() == rows and (run / "checkpoint-2").exists()
    assert owner(run)["pid"] == os.getpid()
    lock.release()
    lock.release()
    call(monkeypatch, "--out", run, "--resume", "--steps", 2)


def test_a_run_that_ends_with_an_error_gives_its_folder_back(monkeypatch, tmp_path):
    def collect(*args):
        raise InputError("the end")
    monkeypatch.setattr(train, "collect", collect)
    with pytest.raises(InputError, match="the end"):
        call(monkeypatch, "--out", tmp_path / "run")
    assert (tmp_path / "run/lock.json").read_text() == ""
    checkpoint.Lock(tmp_path / "run").acquire()


def test_a_dead_owner_is_followed_on_its_own_host_alone(tmp_path):
    dead = {"host": socket.gethostname(), "pid": 1, "started": "2025-01-01 00:00:00"}
    (tmp_path / "lock.json").write_text(json.dumps(dead))       # as SIGKILL leaves it
    lock = checkpoint.Lock(tmp_path)
    lock.acquire()
    assert owner(tmp_path)["pid"] == os.getpid()
    lock.release()
    (tmp_path / "lock.json").write_text(json.dumps(dead | {"host": "elsewhere"}))
    with pytest.raises(InputError, match=f"elsewhere.*if it has ended, delete {tmp_path}/lock"):
        lock.acquire()
    assert owner(tmp_path)["host"] == "elsewhere"
    (tmp_path / "lock.json").unlink()
    lock.acquire()
    lock.release()


# ------------------------------------------------------------------------------ the script

PHASES = {b"r": (train, "collect"), b"u": (train, "update"), b"s": (checkpoint, "save")}
FLAGS = ("--model shapes --no-kl --filter-low --filter-warmup 4 --steps 24 --prompts-per-step 3 "
         "--group-size 4 --unmask-steps 2 --eval-every 0 --sample-every 0 --save-every 1 "
         "--keep-last 2 --lr 1e-3").split()


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
    """Print the step of the last checkpoint after every kill, and how many saves were torn."""
    straight, killed = out / "straight", out / "killed"
    dice, begun, torn = random.Random(0), [], 0
    seconds = finish(*start(straight))
    for i in range(20):
        letter = list(PHASES)[i % 3]
        child, pipe = start(killed, *(["--resume"] if i else []))
        kill(child, pipe, letter, dice.choice([1, 2]), dice.uniform(0, seconds[letter]))
        folders = checkpoint.checkpoints(killed)
        assert all(is_whole(folder) for folder in folders), "one that has its name is not whole"
        begun.append(checkpoint.step_of(folders[-1]) if folders else 0)
        torn += len(list(killed.glob(".checkpoint-*")))
    finish(*start(killed, "--resume"))
    print(json.dumps([begun, torn]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
