"""Processes: devices, errors, and train.py in several of them: the same step as one, shards,
filters and faults that differ between them, signals, a death.

Started as a script, test_processes.py OUT: train.py's main in three processes, and in two, in one
scenario after the other; what each leaves in its folder under OUT is looked at by the tests."""
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import helpers
import pytest
import torch
import torch.distributed as dist
from helpers import DATA, ROOT, TINY, call, equal, metrics, moments, near, trainer, weights

import eval_geneval
import train
from grpo import SampleFilter
from model import load_showo
from shapes import world
from support import processes
from support import run as runs

# a group at a time, in evaluation too: in batches of another size rounding differs, so that another
# token can be drawn
FLAGS = (*TINY, *"--filter-low --micro-batch 4 --eval-n 4".split())
EVALUATED = ("--eval-every", 2, "--eval-prompts", DATA / "eval.jsonl")
PLAIN = {name: getattr(train, name) for name in (
    "load_policy", "make_reward", "update", "clipped_objective")}
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
        for other in processes.all_cat(flat[None]):
            assert torch.equal(other, flat), "the processes' parameters differ"
    optimizer.step = recording_step
    return showo, magvit, reference, optimizer


# ------------------------------------------------------------------------------ alone

def test_one_process_is_the_first_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.setup("cpu") == (0, 1, torch.device("cpu"))
    assert (processes.rank(), processes.world()) == (0, 1)
    tensor = torch.arange(3)
    assert processes.all_sum(tensor) is tensor and processes.all_cat(tensor) is tensor
    assert processes.all_lists([1, 2]) == [1, 2] and processes.barrier() is None


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nonsense"])
def test_a_device_that_is_not_there_is_said(device):
    with pytest.raises(SystemExit, match=f"--device {device}.*: there is none"):
        processes.setup(device)


def test_dtypes():
    assert {processes.choose_dtype(name, "cpu") for name in ("auto", "fp32")} == {torch.float32}
    assert processes.choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    assert processes.choose_dtype("auto", "cuda") == torch.bfloat16


# ------------------------------------------------------------------------------ errors

class Store:
    """Stands for torchrun's key-value store."""
    n = 0

    def add(self, key, amount):
        self.n += amount
        return self.n


def ends(error):
    """Return the exit code of a program whose main() fails, with a stand-in for torchrun's store or
    without."""
    def main():
        raise error
    with pytest.raises(SystemExit) as stopped:
        processes.run(main)
    return stopped.value.code


def test_the_first_process_that_fails_says_a_plain_line(monkeypatch, capsys):
    monkeypatch.setattr(processes.os, "_exit", sys.exit)
    monkeypatch.setattr(processes, "STORE", Store())
    for said in ("--out x: holds another run\n", ""):       # the second one is silent
        assert ends(SystemExit("--out x: holds another run")) == 1
        assert capsys.readouterr().err == said
    monkeypatch.setattr(processes, "STORE", Store())
    assert ends(ValueError("a bug")) == 1                   # a traceback for what is not expected
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.rstrip().endswith("ValueError: a bug")
    for rank, lines in (("0", 1), ("1", 0)):                # before the processes have joined
        monkeypatch.setattr(processes, "STORE", None)
        monkeypatch.setenv("RANK", rank)
        assert ends(SystemExit("--steps: not a number")) == 1
        assert capsys.readouterr().err.count("\n") == lines


def test_alone_python_reports_what_is_not_expected(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="a bug"):
        processes.run(lambda: int("a bug"))


@pytest.mark.parametrize("script", ["train", "sample", "eval_geneval"])
def test_a_lack_of_gpu_memory_names_flags_that_the_script_has(monkeypatch, capsys, script):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    monkeypatch.setattr(processes, "setup", too_much)
    monkeypatch.setattr(processes.os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--model", "shapes", "--out", "x",
                                      *["--prompt", "x"] * (script == "sample")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    said = capsys.readouterr().err
    named = re.findall(r"--[\w-]+", said)
    assert said.startswith("out of GPU memory: take") and said.count("\n") == 1 and named
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert set(named) <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


# ------------------------------------------------------------------------------ together

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that the script leaves; in it, too, the run of one process that takes as many
    prompts a step."""
    out = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_policy", recorded)
        patch.setattr(train, "SampleFilter", early_filter)
        patch.setattr(runs.signal, "signal", lambda *_: None)                   # no handlers
        GRADIENTS.clear()
        call(*FLAGS, "--out", out / "one", "--prompts-per-step", 8, *EVALUATED)
        gradients_of_one = list(GRADIENTS)
        spoil_rewards(0.0, (), 0)
        call(*FLAGS, "--out", out / "no-scores-at-1-as-one", "--no-filter-low", "--steps", 1)
        train.make_reward = PLAIN["make_reward"]
        helpers.write_lines(out / "few.jsonl", world.prompts("train")[5:8] * 2)
        helpers.write_lines(out / "two.jsonl", world.prompts("eval")[3:5])
        few = ("--prompts", out / "few.jsonl", "--no-filter-low")
        call(*FLAGS, "--out", out / "three-as-one", "--prompts-per-step", 6, *few)
        torch.save(gradients_of_one, out / "one.pt")
        helpers.together(__file__, out, n=1)
        shutil.copytree(out / "three", out / "three-then-one",
                        ignore=lambda *_: ["checkpoint-2"])
        call(*FLAGS, "--out", out / "three-then-one", "--prompts-per-step", 6, "--resume", *few)
    return out


def gradients(two, name):
    return torch.load(two / f"{name}.pt")


def near_gradients(first, second):
    """Demand that two runs took steps along the same gradients."""
    assert len(first) > 0
    for a, b in zip(first, second, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() and a.norm() > 0


def demand_same_step(a, b):
    """Demand that two checkpoints are equal but for rounding: each kind of the optimizer's moments,
    and the weights, except where the gradient itself is rounding, of which Adam makes steps."""
    state, other = moments(a), moments(b)
    assert state.keys() == other.keys()
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        assert near(*({i: x for (i, k), x in m.items() if k == kind} for m in (state, other))), kind
    mean = [abs(x) for (_, k), x in sorted(state.items()) if k == "exp_avg"]
    least = 1e-5 * max(x.max() for x in mean)
    a, b = (dict(enumerate(load_showo(folder).parameters())) for folder in (a, b))
    assert near(*({i: p.detach()[mean[i] > least] for i, p in x.items()} for x in (a, b)))


def test_two_processes_take_the_step_of_one_with_twice_the_prompts(two):
    """The first step; and the second from the first one's weights, since with weights that differ
    by rounding another token can be drawn."""
    near_gradients(gradients(two, "one")[:1], gradients(two, "two")[:1])
    near_gradients(gradients(two, "one")[1:], gradients(two, "one-then-zero"))
    one, both, after = (metrics(two / run) for run in ("one", "two", "one-then-zero"))
    assert one[1]["resampled"] == after[1]["resampled"] > 0 and both[1]["resampled"] > 0
    assert one[0]["reward_mean"] == both[0]["reward_mean"]
    demand_same_step(two / "one/checkpoint-1", two / "two/checkpoint-1")
    one, both = (runs.read_rows(two / f"{run}/eval.jsonl") for run in ("one", "two"))
    assert [row["step"] for row in both] == [0, 2] and one[0] == both[0]


def test_two_processes_resume_bit_by_bit(two):
    assert metrics(two / "two-then-two") == metrics(two / "two")
    for of in (weights, moments):
        assert equal(*(of(two / run / "checkpoint-2") for run in ("two-then-two", "two")))


@pytest.mark.parametrize("run", ["zero", "zero-then-two"])
def test_shards_take_the_same_step_and_leave_the_same_files(two, run):
    if run == "zero":
        near_gradients(gradients(two, "two"), gradients(two, "zero"))
    a, b = two / "two/checkpoint-2", two / run / "checkpoint-2"
    names = [sorted(file.name for file in folder.iterdir()) for folder in (a, b)]
    assert names[0] == names[1]
    assert equal(weights(a), weights(b)) and equal(moments(a), moments(b))
    a, b = (trainer(folder) for folder in (a, b))
    assert a["filter"] == b["filter"] and len(a["filter"]["history"]) >= 16
    assert metrics(two / run) == metrics(two / "two")


def test_two_processes_go_on_where_one_was(two):
    demand_same_step(two / "one/checkpoint-2", two / "one-then-zero/checkpoint-2")
    rows = metrics(two / "one-then-zero")
    assert [row["step"] for row in rows] == [1, 2] and rows[0] == metrics(two / "one")[0]


@pytest.mark.parametrize("run", ["two", "zero"])
def test_one_process_goes_on_where_two_were(two, tmp_path, monkeypatch, run):
    shutil.copytree(two / run, tmp_path / run, ignore=lambda *_: ["checkpoint-2"])
    monkeypatch.setattr(train, "SampleFilter", early_filter)
    call(*FLAGS, "--out", tmp_path / run, "--resume", "--prompts-per-step", 8)
    demand_same_step(two / "two/checkpoint-2", tmp_path / run / "checkpoint-2")


@pytest.mark.parametrize("run", ["three", "three-then-one", "three-then-two"])
def test_three_processes_and_prompts_that_stand_twice(two, run):
    """A group's reward depends on its place among all prompts, not on who takes it: in the first
    step, and in the second from the same weights."""
    other, step = ("three-as-one", 1) if run == "three" else ("three", 2)
    wanted, found = (metrics(two / name)[step - 1]["reward_mean"] for name in (other, run))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert len(metrics(two / run)) == 2
    demand_same_step(*(two / name / f"checkpoint-{step}" for name in (other, run)))


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
    assert len(metrics(run)) == 20 and runs.checkpoints(run) == []


def test_one_process_asked_to_stop_stops_all_and_saves(two):
    assert len(metrics(two / "asked")) == 2
    assert runs.checkpoints(two / "asked") == [two / "asked/checkpoint-2"]


def test_machines_with_weights_of_their_own_are_told(two):
    for rank in (0, 1):
        assert "the processes differ in their weights" in (two / f"told-{rank}.txt").read_text()


def test_pictures_of_several_machines_are_scored_as_by_one_process(two, monkeypatch):
    """Each has its own, and one of three processes has none."""
    monkeypatch.chdir(two)
    said = "".join((two / f"scored-{rank}.txt").read_text() for rank in range(3))
    assert said.count("Overall score") == 1 and "Total images: 4\n" in said
    assert [len(list((two / name / "out").rglob("0*.png"))) for name in "ab"] == [2, 2]
    helpers.run(eval_geneval, *PICTURES, two / "two.jsonl")
    rows, wanted = ([row | {"filename": ""} for row in helpers.read_lines(two / name)]
                    for name in ("a/out/results.jsonl", "out/results.jsonl"))
    assert len(rows) == 4 and rows == wanted


DIES = f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from support import processes
plain = train.sample_groups

def sample_groups(examples, keys, *rest):
    if keys[0][1] == 1 and os.environ["RANK"] == "1":       # the second step
        raise OSError("the disk of machine 1 is gone")
    return plain(examples, keys, *rest)
train.sample_groups = sample_groups
processes.run(train.main)
"""


def test_a_process_that_dies_takes_the_job_down_and_nothing_saved_is_lost(tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    run = tmp_path / "run"
    started = helpers.torchrun(tmp_path, "dies.py", *FLAGS, "--steps", 500, "--out", run, n=2,
                       errors=subprocess.PIPE)
    _, errors = started.communicate(timeout=120)
    assert started.returncode != 0 and len(metrics(run)) == 1
    error = "OSError: the disk of machine 1 is gone"        # said once, by the process that has it
    assert errors.count(error) == 1 and "Traceback" in errors.split(error)[0], errors[-3000:]

    assert runs.checkpoints(run) == [run / "checkpoint-1"]
    call(*FLAGS, "--prompts-per-step", 8, "--resume", "--out", run)
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
        if processes.rank() in self.ranks and self.left >= 0:
            scores["reward"] = torch.full_like(scores["reward"], self.value)
        return scores


def spoil_rewards(*how):
    train.make_reward = lambda *args, **kwargs: Spoilt(PLAIN["make_reward"](*args, **kwargs), *how)


def spoil_gradients(step_at):
    """Let a gradient of process 1 be infinite, in a step, or in all of them (None)."""
    def update(groups, *rest):
        spoilt = processes.rank() == 1 and step_at in (groups.keys[0][1], None)
        factor = float("inf") if spoilt else 1
        train.clipped_objective = lambda *args: PLAIN["clipped_objective"](*args) * factor
        return PLAIN["update"](groups, *rest)
    train.update = update


def ask_to_stop(groups, *rest):
    numbers = PLAIN["update"](groups, *rest)
    if groups.keys[0][1] == 1 and processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return numbers


# a prompt at a time: in batches of another size rounding could draw another picture
PICTURES = ("--model shapes --images-per-prompt 2 --batch 2 --steps 4 --device cpu --out out "
            "--prompts").split()


def score(out):
    """Draw and score on two machines, the second with two processes."""
    rank = os.environ["RANK"]
    os.chdir(out / "abb"[int(rank)])
    sys.stdout, sys.argv = open(out / f"scored-{rank}.txt", "w"), [
        "eval_geneval.py", *PICTURES, str(out / "two.jsonl")]
    processes.run(eval_geneval.main)


def forked(n, function, *args):
    """Call a function in n processes that know of each other: what is imported is shared. No thread
    is ever started in this process, so that fork() is safe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(n):
        children.append(os.fork())
        if not children[-1]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
            try:
                function(*args)
            except BaseException:
                traceback.print_exc()
            os._exit(1)         # function() ends its process if all went well
    ends = [os.waitpid(child, 0)[1] for child in children]
    assert ends == [0] * n, ends


def main(out):
    """Go through the scenarios of two processes."""
    place = processes.setup()
    processes.setup = lambda device: place
    train.load_policy, train.SampleFilter = recorded, early_filter
    first, nan = processes.rank() == 0, float("nan")

    def scenario(name, *flags):
        GRADIENTS.clear()
        sys.argv = ["train.py", *FLAGS, "--out", str(out / name), *map(str, flags)]
        train.main()
        if first:
            torch.save(GRADIENTS, out / f"{name}.pt")

    def continued(name, other, *flags):
        """Go on after step 1 of a run, in a copy."""
        processes.barrier()
        if first:
            shutil.copytree(out / name, out / other, ignore=lambda *_: ["checkpoint-2"])
        processes.barrier()
        scenario(other, "--resume", *flags)

    scenario("two", *EVALUATED)
    scenario("zero", "--zero")
    continued("two", "two-then-two")
    continued("zero", "zero-then-two")
    continued("one", "one-then-zero", "--zero")
    continued("three", "three-then-two", "--prompts-per-step", 3, "--no-filter-low", "--prompts",
              out / "few.jsonl")

    spoil_rewards(0.0, (1,), 1000)      # its groups lie under the bar, as soon as there is one
    train.SampleFilter = lambda **_: SampleFilter(percentile=50, warmup=6)
    scenario("filtered", "--save-every", 0, "--reward", "clip:shapes/clip")
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
                 "--no-filter-low", "--reward", "clip:shapes/clip")     # no A is 0
    (out / f"never-finite-{processes.rank()}.txt").write_text(str(error.value))

    # two machines, of which the second has older weights
    train.update, train.clipped_objective = PLAIN["update"], PLAIN["clipped_objective"]
    own, name = out / "ab"[processes.rank()], "pytorch_model.safetensors"
    shutil.copytree(out / "two", own / "run")
    if not first:
        shutil.copy(own / "run/checkpoint-1" / name, own / "run/checkpoint-2" / name)
    os.chdir(own)
    with pytest.raises(SystemExit) as error:
        scenario("absent", "--steps", 3, "--resume", "--out", "run")
    (out / f"told-{processes.rank()}.txt").write_text(str(error.value))

    train.update = ask_to_stop
    with pytest.raises(SystemExit) as error:
        scenario("asked", "--steps", 5, "--save-every", 0)
    assert error.value.code == 128 + signal.SIGTERM
    processes.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.argv = list(map(str, ("train.py", *FLAGS, "--out", folder / "three", "--prompts-per-step",
                              2, "--prompts", folder / "few.jsonl", "--no-filter-low")))
    torch.optim.AdamW(load_showo("shapes").parameters())        # imports what all need
    forked(3, processes.run, train.main)
    forked(2, main, folder)
    forked(3, score, folder)
