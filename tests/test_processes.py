"""train.py in several processes: the same step as one, shards, filters and faults that differ
between them, signals, a death.

Started by torchrun, test_processes.py OUT: train.py's main in two processes, in one scenario after
the other; what each leaves in its folder under OUT is looked at by the tests."""
import json
import os
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
from grpo import SampleFilter

FLAGS = ("--model shapes --no-kl --filter-low --steps 2 --prompts-per-step 4 --group-size 4 "
         "--unmask-steps 4 --eval-every 0 --eval-n 1 --eval-unmask-steps 4 --save-every 1").split()
EVALUATED = ("--eval-every", 2)
PLAIN = {name: getattr(train, name) for name in ("load_policy", "make_reward", "update")}
GRADIENTS = []


def early_filter(**_):
    """A filter that acts from the second step on, on most groups."""
    return SampleFilter(percentile=90, warmup=6)


def recorded(*args):
    """Load as train.py does; the optimizer records every gradient, and demands after every step
    that the processes' parameters are equal."""
    showo, magvit, reference, optimizer = PLAIN["load_policy"](*args)
    step, params = optimizer.step, list(showo.parameters())

    def recording_step():
        GRADIENTS.append(torch.cat([p.grad.flatten() for p in params]))
        step()
        flat = torch.cat([p.detach().flatten() for p in params])
        for other in common.all_cat(flat[None]):
            assert torch.equal(other, flat), "the processes' parameters differ"
    optimizer.step = recording_step
    return showo, magvit, reference, optimizer


# ------------------------------------------------------------------------------ the tests

def torchrun(*command, n=2):
    """Start n processes as a user does -> subprocess.Popen."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n]
    start = map(str, start)
    return subprocess.Popen([*start, *map(str, command)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT)


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, *map(str, flags)])
    train.main()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that the script leaves; in it, too, the run of one process that takes as many
    prompts a step."""
    out = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_policy", recorded)
        patch.setattr(train, "SampleFilter", early_filter)
        patch.setattr(common, "StopSignal", lambda: SimpleNamespace(number=0))   # no handlers
        GRADIENTS.clear()
        call(patch, "--out", out / "one", "--prompts-per-step", 8, *EVALUATED)
        gradients_of_one = list(GRADIENTS)
        spoil_rewards(0.0, (), 0)
        call(patch, "--out", out / "no-scores-at-1-as-one", "--no-filter-low", "--steps", 1)
        train.make_reward = PLAIN["make_reward"]
        (out / "few.txt").write_text("a photo of a star\na photo of two moons\na heart\n" * 2)
        few = ("--prompts", out / "few.txt", "--no-filter-low", "--reward", "clip:shapes/clip")
        call(patch, "--out", out / "three-as-one", "--prompts-per-step", 6, *few)
        started = torchrun(ROOT / "train.py", *FLAGS, "--out", out / "three", "--prompts-per-step",
                           2, *few, n=3)
        _, errors = started.communicate(timeout=300)
        assert started.returncode == 0, errors[-3000:]
        shutil.copytree(out / "three", out / "three-then-one",
                        ignore=lambda *_: ["checkpoint-2"])
        call(patch, "--out", out / "three-then-one", "--prompts-per-step", 6, "--resume", *few)
    torch.save(gradients_of_one, out / "one.pt")
    started = torchrun(__file__, out)
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors[-3000:]
    return out


def weights(folder):
    return load_file(folder / "pytorch_model.safetensors")


def trainer(folder, name="trainer"):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def moments(folder):
    """Return the optimizer's tensors by parameter and kind."""
    state = trainer(folder, "optimizer")["state"]
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


@pytest.mark.parametrize("run", ["two-then-two"])
def test_two_processes_resume_bit_by_bit(two, run):
    straight = two / run.split("-")[0]
    assert metrics(two / run) == metrics(straight)
    equal(weights(two / run / "checkpoint-2"), weights(straight / "checkpoint-2"))
    equal(moments(two / run / "checkpoint-2"), moments(straight / "checkpoint-2"))


@pytest.mark.parametrize("run", ["zero", "zero-then-two"])
def test_shards_take_the_same_step_and_leave_the_same_files(two, run):
    if run == "zero":
        near_gradients(two, "two", "zero")
    a, b = two / "two/checkpoint-2", two / run / "checkpoint-2"
    names = [sorted(file.name for file in folder.iterdir()) for folder in (a, b)]
    assert names[0] == names[1]
    equal(weights(a), weights(b))
    equal(moments(a), moments(b))
    a, b = (trainer(folder) for folder in (a, b))
    assert a["filter"] == b["filter"] and len(a["filter"]["history"]) >= 16
    assert metrics(two / run) == metrics(two / "two")


@pytest.mark.parametrize("run", ["one-then-zero"])
def test_two_processes_go_on_where_one_was(two, run):
    near(weights(two / "one/checkpoint-2"), weights(two / run / "checkpoint-2"))
    near(moments(two / "one/checkpoint-2"), moments(two / run / "checkpoint-2"))
    assert [row["step"] for row in metrics(two / run)] == [1, 2]
    assert metrics(two / run)[0] == metrics(two / "one")[0]


@pytest.mark.parametrize("run", ["two", "zero"])
def test_one_process_goes_on_where_two_were(two, tmp_path, monkeypatch, run):
    shutil.copytree(two / run, tmp_path / run, ignore=lambda *_: ["checkpoint-2"])
    monkeypatch.setattr(train, "SampleFilter", early_filter)
    call(monkeypatch, "--out", tmp_path / run, "--resume", "--prompts-per-step", 8)
    near(weights(two / "two/checkpoint-2"), weights(tmp_path / run / "checkpoint-2"))
    near(moments(two / "two/checkpoint-2"), moments(tmp_path / run / "checkpoint-2"))


@pytest.mark.parametrize("run", ["three", "three-then-one", "three-then-two"])
def test_three_processes_and_prompts_that_stand_twice(two, run):
    """A group's reward depends on its place among all prompts, not on who takes it."""
    wanted, rows = metrics(two / "three-as-one"), metrics(two / run)
    assert [row["reward_mean"] for row in rows] == pytest.approx(
        [row["reward_mean"] for row in wanted], rel=1e-5)
    near(weights(two / "three-as-one/checkpoint-2"), weights(two / run / "checkpoint-2"))


def test_processes_that_filter_differently_stay_together(two):
    rows = metrics(two / "filtered")
    assert [row["resampled"] for row in rows] == [0, 4]         # the groups of process 1
    taken = gradients(two, "filtered")
    assert len(taken) == 2 and min(gradient.norm() for gradient in taken) > 0


def test_a_step_without_a_reward_is_not_taken_anywhere(two):
    """Pictures of one process without a score: the others' count. Of both: no step."""
    rows = metrics(two / "no-scores-at-1")
    assert [row["taken"] for row in rows] == [1, 1] and rows[0]["reward_mean"] is not None
    alone = metrics(two / "no-scores-at-1-as-one")
    assert rows[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-5)
    rows = metrics(two / "no-scores")
    assert [row["taken"] for row in rows] == [0, 0, 1, 1]
    assert rows[0]["reward_mean"] is None and len(gradients(two, "no-scores")) == 2
    steps = sorted(int(f.name[11:]) for f in (two / "no-scores").glob("checkpoint-*"))
    assert steps == [3, 4]                  # not after a step that was not taken


def test_a_gradient_that_is_not_finite_at_one_process_is_applied_nowhere(two):
    rows = metrics(two / "not-finite")
    assert [row["taken"] for row in rows] == [0, 1]
    assert rows[0]["grad_norm"] is None and len(gradients(two, "not-finite")) == 1


def test_twenty_steps_that_are_not_taken_end_the_run_everywhere(two):
    run, said = two / "never-finite", [
        (two / f"never-finite-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and said[0].startswith("20 steps in a row were not taken")
    assert len(metrics(run)) == 20 and checkpoint.checkpoints(run) == []


def test_one_process_asked_to_stop_stops_all_and_saves(two):
    assert len(metrics(two / "asked")) == 2
    assert checkpoint.checkpoints(two / "asked") == [two / "asked/checkpoint-2"]


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
    assert f"stopped by a signal after step {last}; go on with --resume" in printed and last < 500
    assert checkpoint.checkpoints(run) == [run / f"checkpoint-{last}"]


DIES = f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import common, train
plain = train.sample_groups

def sample_groups(examples, keys, *rest):
    if keys[0][1] == 1 and os.environ["RANK"] == "1":       # the second step
        raise OSError("the disk of machine 1 is gone")
    return plain(examples, keys, *rest)
train.sample_groups = sample_groups
common.run(train.main)
"""


def test_a_process_that_dies_takes_the_job_down_and_nothing_saved_is_lost(monkeypatch, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    run = tmp_path / "run"
    started = torchrun(tmp_path / "dies.py", *FLAGS, "--steps", 500, "--out", run)
    _, errors = started.communicate(timeout=120)
    assert started.returncode != 0 and len(metrics(run)) == 1
    error = "OSError: the disk of machine 1 is gone"        # said once, by the process that has it
    assert errors.count(error) == 1 and "Traceback" in errors.split(error)[0], errors[-3000:]

    assert checkpoint.checkpoints(run) == [run / "checkpoint-1"]
    call(monkeypatch, "--steps", 2, "--prompts-per-step", 8, "--resume", "--out", run)
    assert [row["step"] for row in metrics(run)] == [1, 2]


# ------------------------------------------------------------------------------ the script

class Spoilt:
    """A reward that gives a value of its own to every picture of some processes, for so many
    pictures of a process."""

    def __init__(self, reward, value, ranks, n_pictures):
        self.reward, self.value, self.ranks, self.left = reward, value, ranks, n_pictures
        self.spec, self.weights = reward.spec, {"reward": 1.0}

    def score(self, images, examples, n=1):
        scores = self.reward.score(images, examples, n)
        self.left -= len(images)
        if common.rank() in self.ranks and self.left >= 0:
            scores["reward"] = torch.full_like(scores["reward"], self.value)
        return scores


def spoil_rewards(*how):
    train.make_reward = lambda *args, **kwargs: Spoilt(PLAIN["make_reward"](*args, **kwargs), *how)


def spoil_gradients(step_at):
    """Let a gradient of process 1 be infinite, in a step, or in all of them (None)."""
    def update(step, examples, traj, adv, *rest):
        if common.rank() == 1 and step_at in (step, None):
            adv = adv * float("inf")
        return PLAIN["update"](step, examples, traj, adv, *rest)
    train.update = update


def ask_to_stop(step, *rest):
    numbers = PLAIN["update"](step, *rest)
    if step == 1 and common.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return numbers


def main(out):
    """Go through the scenarios."""
    place = common.setup()
    common.setup = lambda device: place
    train.load_policy, train.SampleFilter = recorded, early_filter
    first, nan = common.rank() == 0, float("nan")

    def scenario(name, *flags):
        GRADIENTS.clear()
        sys.argv = ["train.py", *FLAGS, "--out", str(out / name), *map(str, flags)]
        train.main()
        if first:
            torch.save(GRADIENTS, out / f"{name}.pt")

    def continued(name, other, *flags):
        """Go on after step 1 of a run, in a copy."""
        common.barrier()
        if first:
            shutil.copytree(out / name, out / other, ignore=lambda *_: ["checkpoint-2"])
        common.barrier()
        scenario(other, "--resume", *flags)

    scenario("two", *EVALUATED)
    scenario("zero", "--zero")
    continued("two", "two-then-two")
    continued("zero", "zero-then-two")
    continued("one", "one-then-zero", "--zero")
    continued("three", "three-then-two", "--prompts-per-step", 3, "--no-filter-low", "--prompts",
              out / "few.txt", "--reward", "clip:shapes/clip")

    spoil_rewards(0.0, (1,), 1000)      # its groups lie under the bar, as soon as there is one
    train.SampleFilter = lambda **_: SampleFilter(percentile=50, warmup=6)
    scenario("filtered", "--save-every", 0)
    train.SampleFilter = early_filter

    spoil_rewards(nan, (1,), 1000)
    scenario("no-scores-at-1", "--no-filter-low")
    spoil_rewards(nan, (0, 1), 2 * 16)
    scenario("no-scores", "--no-filter-low", "--steps", 4)

    train.make_reward = PLAIN["make_reward"]
    spoil_gradients(0)
    scenario("not-finite")
    spoil_gradients(None)
    with pytest.raises(SystemExit) as error:
        scenario("never-finite", "--steps", 25, "--prompts-per-step", 1, "--unmask-steps", 1,
                 "--no-filter-low")
    (out / f"never-finite-{common.rank()}.txt").write_text(str(error.value))

    train.update = ask_to_stop
    with pytest.raises(SystemExit) as error:
        scenario("asked", "--steps", 5, "--save-every", 0)
    assert error.value.code == 128 + signal.SIGTERM
    common.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
