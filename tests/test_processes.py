"""train.py in several processes: the same step as one, shards, filters and faults that differ
between them, signals, a death.

Started by torchrun, test_processes.py OUT: train.py's main in two processes, in one scenario after
the other; what each leaves in its folder under OUT is looked at by the tests."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, metrics
from safetensors.torch import load_file

import checkpoint
import common
import train
from checkpoint import InputError

FLAGS = ("--model shapes --no-kl --filter-low --steps 2 --prompts-per-step 4 --group-size 4 "
         "--unmask-steps 4 --filter-warmup 6 --filter-percentile 90 --eval-every 0 --eval-n 1 "
         "--eval-unmask-steps 4 "
         "--sample-every 0 --save-every 1").split()
EVALUATED = ("--eval-every", 2)
PLAIN = {name: getattr(train, name) for name in ("make_optimizer", "make_reward", "update")}
GRADIENTS = []


def recorded(args, showo, resumed):
    """Make train.py's optimizer so that it records every gradient, and demands after every step
    that the processes' parameters are equal."""
    optimizer = PLAIN["make_optimizer"](args, showo, resumed)
    step, params = optimizer.step, list(showo.parameters())

    def recording_step():
        GRADIENTS.append(torch.cat([p.grad.flatten() for p in params]))
        step()
        flat = torch.cat([p.detach().flatten() for p in params])
        for other in common.all_cat(flat[None]):
            assert torch.equal(other, flat), "the processes' parameters differ"
    optimizer.step = recording_step
    return optimizer


# ------------------------------------------------------------------------------ the tests

def torchrun(*command):
    """Start two processes as a user does -> subprocess.Popen."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen([*start, *map(str, command)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, *map(str, flags)])
    train.main()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that the script leaves; in it, too, the run of one process that takes as many
    prompts a step."""
    out = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_optimizer", recorded)
        patch.setattr(common, "StopSignal", lambda: SimpleNamespace(asked=0))   # no handlers
        GRADIENTS.clear()
        call(patch, "--out", out / "one", "--prompts-per-step", 8, *EVALUATED)
    torch.save(GRADIENTS, out / "one.pt")
    started = torchrun(__file__, out)
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors[-3000:]
    return out


def weights(folder):
    return load_file(folder / "pytorch_model.safetensors")


def moments(folder):
    """Return the optimizer's tensors by parameter and kind."""
    state = checkpoint.read_trainer(folder)["optimizer"]["state"]
    kinds = {"step", "exp_avg", "exp_avg_sq"}
    assert all(tensors.keys() == kinds for tensors in state.values())
    return {(i, kind): state[i][kind] for i in state for kind in kinds}


def equal(a, b):
    """Demand that two dicts hold the same tensors, bit by bit."""
    assert a.keys() == b.keys() and len(a) > 0
    assert all(torch.equal(a[name], b[name]) for name in a)


def near(a, b):
    """Demand that all tensors of two dicts together are equal to 1e-5 of their norm (one by one,
    Adam turns rounding of a zero gradient into steps)."""
    assert a.keys() == b.keys() and all(a[name].dtype == b[name].dtype for name in a)
    a, b = (torch.cat([x[name].flatten() for name in a]) for x in (a, b))
    assert (a - b).norm() <= 1e-5 * a.norm()


def gradients(two, name):
    return torch.load(two / f"{name}.pt")


def near_gradients(two, first, second):
    """Demand that two runs took steps along the same gradients."""
    pairs = list(zip(gradients(two, first), gradients(two, second), strict=True))
    assert len(pairs) == 2
    for a, b in pairs:
        assert (a - b).norm() <= 1e-5 * a.norm() and a.norm() > 0


def test_two_processes_take_the_step_of_one_with_twice_the_prompts(two):
    near_gradients(two, "one", "two")
    one, both = metrics(two / "one"), metrics(two / "two")
    assert one[1]["resampled"] == both[1]["resampled"] > 0
    assert one[0]["reward_mean"] == both[0]["reward_mean"]
    near(weights(two / "one/checkpoint-2"), weights(two / "two/checkpoint-2"))
    one, both = (checkpoint.read_rows(two / f"{run}/eval.jsonl") for run in ("one", "two"))
    assert [row["step"] for row in both] == [0, 2] and one[0] == both[0]


@pytest.mark.parametrize("run", ["two-then-two", "zero-then-zero"])
def test_two_processes_resume_bit_by_bit(two, run):
    straight = two / run.split("-")[0]
    assert metrics(two / run) == metrics(straight)
    equal(weights(two / run / "checkpoint-2"), weights(straight / "checkpoint-2"))
    equal(moments(two / run / "checkpoint-2"), moments(straight / "checkpoint-2"))


@pytest.mark.parametrize("run", ["zero", "two-then-zero", "zero-then-two"])
def test_shards_take_the_same_step_and_leave_the_same_files(two, run):
    if run == "zero":
        near_gradients(two, "two", "zero")
    a, b = two / "two/checkpoint-2", two / run / "checkpoint-2"
    names = [sorted(file.name for file in folder.iterdir()) for folder in (a, b)]
    assert names[0] == names[1]
    equal(weights(a), weights(b))
    equal(moments(a), moments(b))
    a, b = (checkpoint.read_trainer(folder) for folder in (a, b))
    assert a["filter"] == b["filter"] and len(a["filter"]["history"]) >= 16
    assert metrics(two / run) == metrics(two / "two")


@pytest.mark.parametrize("run", ["one-then-two", "one-then-zero"])
def test_two_processes_go_on_where_one_was(two, run):
    near(weights(two / "one/checkpoint-2"), weights(two / run / "checkpoint-2"))
    near(moments(two / "one/checkpoint-2"), moments(two / run / "checkpoint-2"))
    assert [row["step"] for row in metrics(two / run)] == [1, 2]
    assert metrics(two / run)[0] == metrics(two / "one")[0]


@pytest.mark.parametrize("run", ["two", "zero"])
def test_one_process_goes_on_where_two_were_with_a_notice(two, tmp_path, monkeypatch, capsys, run):
    shutil.copytree(two / run, tmp_path / run, ignore=lambda *_: ["checkpoint-2"])
    call(monkeypatch, "--out", tmp_path / run, "--resume", "--prompts-per-step", 8)
    sharded = "zero True -> False, " if run == "zero" else ""
    assert (f"notice: changed since that checkpoint: prompts_per_step 4 -> 8, {sharded}"
            "processes 2 -> 1") in capsys.readouterr().out.splitlines()
    near(weights(two / "two/checkpoint-2"), weights(tmp_path / run / "checkpoint-2"))
    near(moments(two / "two/checkpoint-2"), moments(tmp_path / run / "checkpoint-2"))


def test_fewer_prompts_or_more_steps_go_on_with_a_notice(two, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(two / "two", tmp_path / "run", ignore=lambda *_: ["checkpoint-2"])
    call(monkeypatch, "--out", run, "--resume")
    notice = "notice: changed since that checkpoint: processes 2 -> 1"
    assert notice in capsys.readouterr().out.splitlines()
    call(monkeypatch, "--out", run, "--resume", "--steps", 3, "--lr", 1e-3)
    notice = "notice: changed since that checkpoint: steps 2 -> 3, lr 0.0007 -> 0.001"
    assert notice in capsys.readouterr().out.splitlines()
    assert [row["step"] for row in metrics(run)] == [1, 2, 3] and (run / "checkpoint-3").exists()


def test_processes_that_filter_differently_stay_together(two):
    rows = metrics(two / "filtered")
    assert len(rows) == 5
    for row in rows[1:3]:                   # process 1: its 4 groups, twice
        assert 8 <= row["resampled"] <= 16
    taken = gradients(two, "filtered")
    assert len(taken) == 5 and min(gradient.norm() for gradient in taken) > 0


def test_what_is_not_finite_skips_the_step_everywhere(two):
    rows = metrics(two / "not-finite")
    assert [row["skipped"] for row in rows] == [1, 1, 1, 0, 0]
    assert len(gradients(two, "not-finite")) == 2
    assert all(len(row["bad_prompts"]) == 4 for row in rows[:3]) and rows[3]["bad_prompts"] == []
    known = {example["prompt"] for example in train.shapes.prompts("train")}
    assert set(rows[0]["bad_prompts"]) <= known
    assert rows[0]["reward_mean"] is not None


def said(two, name):
    """Return what stopped a scenario, which all processes say alike."""
    first, second = ((two / f"{name}-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    return first


def test_too_many_skipped_steps_end_the_run_everywhere(two):
    run = two / "never-finite"
    assert re.fullmatch(f"2 steps had .* not finite; look .*; saved: {run}/checkpoint-2, continue "
                        f"with --resume --out {run}", said(two, "never-finite"))
    assert len(metrics(run)) == 2 and gradients(two, "never-finite") == []
    equal(weights(run / "checkpoint-2"), weights(ROOT / "shapes"))

    # shards of an optimizer that has not stepped are saved, too
    assert checkpoint.read_trainer(run / "checkpoint-1")["optimizer"]["state"] == {}
    assert [row["skipped"] for row in metrics(two / "finite-again")] == [1, 0]
    assert moments(two / "finite-again/checkpoint-2")[0, "step"] == 1


def test_a_reward_that_fails_on_one_process_ends_the_run_everywhere(two):
    run = two / "no-server"
    assert said(two, "no-server") == (f"no server at 1; saved: {run}/checkpoint-1, continue with "
                                      f"--resume --out {run}")
    assert [row["skipped"] for row in metrics(run)] == [1]


def test_one_process_asked_to_stop_stops_all_and_saves(two):
    assert len(metrics(two / "asked")) == 2
    assert checkpoint.newest(two / "asked") == two / "asked/checkpoint-2"


def test_a_process_that_drifts_is_named(two):
    assert said(two, "drifted").startswith(
        "process 1 of 2 no longer holds the parameters of process 0; ")
    assert len(metrics(two / "drifted")) == 2
    assert checkpoint.checkpoints(two / "drifted") == [two / "drifted/checkpoint-1"]


def test_what_the_first_process_refuses_all_refuse(two):
    assert said(two, "taken") == (f"--out {two / 'two'}: holds another run; continue it with "
                                  "--resume or choose another folder")
    assert said(two, "no-run") == f"--resume: no checkpoint in {two / 'nowhere'}"
    assert not (two / "nowhere").exists()
    assert said(two, "no-folder").startswith("/dev/null")


def test_a_line_of_json_per_step(two):
    def refuse(name):
        pytest.fail(f"{name} is no JSON")
    for line in (two / "not-finite/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def wait_for(path, started):
    """Return when a file is there."""
    while not (path.exists() and path.stat().st_size):
        assert started.poll() is None, started.communicate()[1][-3000:]
        time.sleep(0.05)


def test_torchrun_passes_a_signal_on_and_every_process_saves(tmp_path):
    run = tmp_path / "run"
    started = torchrun(ROOT / "train.py", *FLAGS, "--steps", 500, "--save-every", 0, "--out", run)
    wait_for(run / "metrics.jsonl", started)
    started.send_signal(signal.SIGTERM)
    printed, _ = started.communicate(timeout=120)
    last = metrics(run)[-1]["step"]
    assert f"stopped after step {last}, as a signal asked" in printed and last < 500
    assert checkpoint.newest(run) == run / f"checkpoint-{last}"


DIES = f"""import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import common, train
plain, how = train.collect, sys.argv.pop(1)

def collect(step, *rest):
    if step == 1 and os.environ["RANK"] == "1":
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("the disk of machine 1 is gone")
    return plain(step, *rest)
train.collect = collect
common.run(train.main)
"""


@pytest.mark.parametrize("how, error", [
    ("broken", "OSError: the disk of machine 1 is gone"),
    ("killed", "dies.py: error: lost another process, or the network between them (")])
def test_a_process_that_dies_takes_the_job_down_and_nothing_saved_is_lost(
        monkeypatch, tmp_path, how, error):
    (tmp_path / "dies.py").write_text(DIES)
    run = tmp_path / "run"
    started = torchrun(tmp_path / "dies.py", how, *FLAGS, "--steps", 500, "--out", run)
    _, errors = started.communicate(timeout=120)
    assert started.returncode != 0 and len(metrics(run)) == 1
    lines = [line for line in errors.splitlines() if "rror: " in line]
    own = [line for line in lines if not line.startswith("torch.distributed.elastic")]
    assert len(own) == 1 and own[0].removeprefix("[rank1]: ").startswith(error), errors[-3000:]

    assert checkpoint.newest(run) == run / "checkpoint-1"
    call(monkeypatch, "--steps", 2, "--prompts-per-step", 8, "--resume", "--out", run)
    assert [row["step"] for row in metrics(run)] == [1, 2]


# ------------------------------------------------------------------------------ the script

class Spoilt:
    """A reward that gives a value of its own to every picture of process 1, for so many pictures;
    None: that fails."""

    def __init__(self, reward, value, n_pictures):
        self.reward, self.value, self.left = reward, value, n_pictures

    def __call__(self, images, prompts, metadata):
        scores = self.reward(images, prompts, metadata)
        self.log = self.reward.log
        self.left -= len(images)
        if common.get_rank() != 1 or self.left < 0:
            return scores
        if self.value is None:
            raise InputError("no server at 1")
        return torch.full_like(scores, self.value)


def spoil_rewards(value, n_pictures):
    def make_reward(*args, **kwargs):
        return Spoilt(PLAIN["make_reward"](*args, **kwargs), value, n_pictures)
    train.make_reward = make_reward


def in_step_2_of_process_1(harm):
    """Let process 1 harm itself in the middle of a run."""
    def update(step, batch, args, showo, *rest):
        numbers = PLAIN["update"](step, batch, args, showo, *rest)
        if step == 1 and common.get_rank() == 1:
            harm(showo)
        return numbers
    train.update = update


def ask_to_stop(showo):
    os.kill(os.getpid(), signal.SIGTERM)


def lose_a_bit(showo):
    with torch.no_grad():
        next(showo.parameters())[3, 5] += 1e-6


def main(out):
    """Go through the scenarios."""
    place = common.setup()
    common.setup = lambda device: place
    train.make_optimizer = recorded
    first = common.get_rank() == 0

    def scenario(name, *flags):
        GRADIENTS.clear()
        sys.argv = ["train.py", *FLAGS, "--out", str(out / name), *map(str, flags)]
        train.main()
        if first:
            torch.save(GRADIENTS, out / f"{name}.pt")

    def stopped(name, *flags):
        with pytest.raises(InputError) as error:
            scenario(name, *flags)
        (out / f"{name}-{common.get_rank()}.txt").write_text(str(error.value))
        if first:
            torch.save(GRADIENTS, out / f"{name}.pt")

    def continued(name, other, *flags):
        """Go on after step 1 of a run, in a copy."""
        if first:
            shutil.copytree(out / name, out / other, ignore=lambda *_: ["checkpoint-2"])
        common.barrier()
        scenario(other, "--resume", *flags)

    scenario("two", *EVALUATED)
    scenario("zero", "--zero")
    continued("two", "two-then-two")
    continued("two", "two-then-zero", "--zero")
    continued("zero", "zero-then-zero", "--zero")
    continued("zero", "zero-then-two")
    continued("one", "one-then-two")
    continued("one", "one-then-zero", "--zero")

    stopped("taken", "--out", out / "two")
    stopped("no-run", "--out", out / "nowhere", "--resume")
    stopped("no-folder", "--out", "/dev/null")

    spoil_rewards(0.0, 9 * 16)      # its groups are all under the bar, three times in each step
    scenario("filtered", "--steps", 5, "--unmask-steps", 8, "--filter-warmup", 1,
             "--max-resample", 2, "--save-every", 0)
    spoil_rewards(float("nan"), 3 * 16)
    scenario("not-finite", "--steps", 5, "--save-every", 0)
    stopped("never-finite", "--steps", 5, "--max-bad-steps", 2, "--zero")
    spoil_rewards(None, 16)
    stopped("no-server", "--steps", 5)

    train.make_reward = PLAIN["make_reward"]
    continued("never-finite", "finite-again", "--zero")
    in_step_2_of_process_1(ask_to_stop)
    scenario("asked", "--steps", 5, "--save-every", 0)
    in_step_2_of_process_1(lose_a_bit)
    stopped("drifted", "--steps", 5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
