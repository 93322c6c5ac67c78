"""What spans several files, as users meet it: one command after the other in one folder, the ends
of a run, restarts, launchers, several machines."""
import errno
import gc
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

import helpers
import pytest
import torch
from helpers import ROOT, TINY, call, metrics, read_lines, refused, run, torchrun, trainer, weights
from PIL import Image

import eval_geneval
import reward
import sample
import support.run
import train
from support import processes

GENEVAL = "--model shapes --n 1 --steps 2 --prompts few.jsonl".split()
SAMPLE = "--model shapes --n 2 --steps 2 --prompts few.jsonl".split()


MANY = ("--model shapes --no-kl --prompts-per-step 1 --group-size 4 --unmask-steps 2 --steps 2 "
        "--eval-every 0 --save-every 1 --lr 1e-3 --filter-low --out run").split()


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A working folder of its own, with a few prompts."""
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "shapes/eval.jsonl").read_text().splitlines(keepends=True)
    Path("few.jsonl").write_text("".join(lines[:3]))
    Path("other.jsonl").write_text("".join(lines[3:5]))


def files_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------ folders of pictures

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    call("--steps", 1, "--out", out)
    return out / "checkpoint-1"


def test_a_folder_takes_no_other_pictures_for_its_own(trained, monkeypatch, capsys):
    run(eval_geneval, *GENEVAL, "--out", "out")
    facts = json.loads(Path("out/summary.json").read_text())["drawn"]
    assert facts["weights"].startswith("shapes (") and facts["prompts"].startswith("3 prompts (")
    assert [facts[name] for name in ("n", "T", "guidance", "temperature", "seed")] == [
        1, 2, 0, 1, 0]
    before = files_of("out")
    monkeypatch.setattr(sample, "drawer", lambda *_: pytest.fail("models were loaded"))
    for flags, message in (
            (["--ckpt", trained], r"weights shapes \(\w+\), not .*/checkpoint-1 \(\w+\)"),
            (["--n", 2], "n 1, not 2"), (["--steps", 3], "T 2, not 3"), (["--cfg", 2], "guidance"),
            (["--seed", 7], "seed 0, not 7"), (["--temperature", 0], "temperature 1.0, not 0.0"),
            (["--prompts", "other.jsonl"], "prompts 3 prompts .*, not 2 prompts"),
            (["--dtype", "bf16"], "dtype float32, not bfloat16")):
        said = refused(eval_geneval, *GENEVAL, "--out", "out", *flags)
        assert said.startswith("--out out: its pictures were drawn with ")
        assert re.search(message, said) and said.endswith("Choose another folder")
    assert files_of("out") == before


def test_a_folder_is_gone_on_with_by_the_same_command(trained, capsys):
    run(eval_geneval, *GENEVAL, "--out", "out")
    first, scores = files_of("out"), Path("out/summary.txt").read_text()
    Path("out/00001/samples/0000.png").unlink()
    os.truncate("out/00002/samples/0000.png", 100)          # drawn again, too
    capsys.readouterr()
    run(eval_geneval, *GENEVAL, "--out", "out")
    assert "1 of 3 pictures are there already and stay" in capsys.readouterr().out
    assert files_of("out") == first and Path("out/summary.txt").read_text() == scores
    # a copy of the weights has another name and draws the same
    shutil.copytree(trained, "copy")
    run(sample, *SAMPLE, "--ckpt", trained, "--out", "drawn")
    run(sample, *SAMPLE, "--ckpt", "copy", "--out", "drawn")
    assert "6 of 6 pictures are there already" in capsys.readouterr().out
    assert "seed 0, not 1" in refused(sample, *SAMPLE, "--ckpt", "copy", "--out", "drawn", "--seed",
                                      1)


def test_pictures_from_elsewhere_are_scored_and_not_drawn_over():
    run(eval_geneval, *GENEVAL, "--out", "out")
    text = Path("out/summary.txt").read_text()
    Path("out/drawn.json").unlink()
    run(eval_geneval, "--model", "shapes", "--score-only", "out")
    assert Path("out/summary.txt").read_text() == text
    for script, flags in ((eval_geneval, GENEVAL), (sample, SAMPLE)):
        assert "holds pictures, but no drawn.json" in refused(script, *flags, "--out", "out")


@pytest.mark.parametrize("batch, n", [(2, 3), (1, 2), (5, 2)])
def test_more_pictures_a_prompt_than_a_batch(batch, n):
    run(eval_geneval, *GENEVAL, "--batch", batch, "--n", n, "--out", "out")
    assert json.loads(Path("out/summary.json").read_text())["images"] == 3 * n
    run(sample, *SAMPLE, "--batch", batch, "--n", n, "--out", "drawn")
    assert len(list(Path("drawn").glob("*.png"))) == 3 * n


def test_broken_and_missing_pictures_are_named():
    run(eval_geneval, *GENEVAL, "--out", "out")
    score = ("--model", "shapes", "--score-only", "out")
    large = Image.open("out/00000/samples/0000.png").resize((96, 96), Image.Resampling.NEAREST)
    large.save("out/00000/samples/0001.png")                # two sizes in a folder
    run(eval_geneval, *score)
    rows = read_lines(Path("out/results.jsonl").resolve())
    assert len(rows) == 4 and rows[0]["correct"] == rows[1]["correct"]
    os.truncate("out/00001/samples/0000.png", 100)
    assert refused(eval_geneval, *score).startswith("out/00001/samples/0000.png: is no whole pict")
    Path("out/00001/samples/0000.png").unlink()
    assert refused(eval_geneval, *score).startswith("out/00001: has no metadata.jsonl, or no pict")


@pytest.mark.parametrize("name", ["fox.jpg", "fox.PNG", "deep/fox.webp"])
def test_a_name_of_a_picture_makes_a_picture(name):
    run(sample, "--model", "shapes", "--prompt", "a photo of a star", "--steps", 2, "--out", name)
    assert Image.open(name).size == (148, 176)


# ------------------------------------------------------------------------------ how a run ends

@pytest.fixture
def not_taken(monkeypatch):
    """A function that makes updates of some steps not finite."""
    plain, calls = train.clipped_objective, []

    def spoil(*steps, per_step=2):
        def objective(*args):
            calls.append(1)
            return plain(*args) * (float("nan") if (len(calls) - 1) // per_step in steps else 1)
        monkeypatch.setattr(train, "clipped_objective", objective)
    return spoil


def test_weights_of_the_last_step_that_was_taken_are_saved(not_taken):
    """At the end, and where a save is due."""
    not_taken(1, 3)
    call("--steps", 4, "--save-every", 2, "--micro-batch", 99, "--out", "run")
    assert [row["taken"] for row in metrics(Path("run"))] == [1, 0, 1, 0]
    folders = support.run.checkpoints("run")
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-4"]
    assert not helpers.equal(weights(folders[0]), weights(folders[1]))


class Reward:
    """A reward that fails, or has no score, from some call on."""

    def __init__(self, inner, calls, fail):
        self.inner, self.left, self.fail = inner, calls, fail
        self.spec, self.weights = inner.spec, inner.weights

    def score(self, *args):
        self.left -= 1
        return self.fail() if self.left < 0 else self.inner.score(*args)


def away():
    raise SystemExit("--reward http://x: no scores")


def broken():
    raise KeyError("a bug in a reward of one's own")


@pytest.fixture
def failing(monkeypatch):
    plain = train.make_reward

    def make(spec, calls, fail):
        monkeypatch.setattr(train, "make_reward", lambda given, **how: Reward(
            plain(given, **how), calls if given == spec else 99, fail))
    return make


@pytest.mark.parametrize("fail, message", [(away, "http://x: no scores"), (broken, "KeyError")])
def test_a_reward_that_fails_loses_no_step(failing, fail, message):
    failing("geneval:partial", 3, fail)
    with pytest.raises(SystemExit, match=message):
        call("--steps", 4, "--save-every", 0, "--out", "run")
    assert [folder.name for folder in support.run.checkpoints("run")] == ["checkpoint-3"]
    failing("geneval:partial", 99, fail)
    gc.collect()
    call("--steps", 4, "--out", "run", "--resume")
    call("--steps", 4, "--out", "straight")
    assert metrics(Path("run")) == metrics(Path("straight"))


def test_an_evaluation_that_fails_loses_no_step(failing):
    failing("geneval:exact", 1, away)       # after the first evaluation
    with pytest.raises(SystemExit, match="no scores"):
        call("--eval-every", 2, "--eval-prompts", "few.jsonl", "--eval-reward", "geneval:exact",
             "--save-every", 0, "--out", "run")
    assert [folder.name for folder in support.run.checkpoints("run")] == ["checkpoint-2"]


def test_a_filter_s_history_is_that_of_whole_steps(failing, monkeypatch):
    """A reward that fails when groups are sampled again: the step is done anew after a resume."""
    monkeypatch.setattr(train.SampleFilter, "bar", property(lambda own: 9.0))   # all are low
    flags = ("--filter-low", "--save-every", 0, "--steps", 3)
    call(*flags, "--out", "straight")
    failing("geneval:partial", 3, away)     # the second scoring of step 2
    with pytest.raises(SystemExit):
        call(*flags, "--out", "run")
    failing("geneval:partial", 99, away)
    gc.collect()
    call(*flags, "--out", "run", "--resume")
    assert metrics(Path("run")) == metrics(Path("straight"))
    states = [trainer(Path(out) / "checkpoint-3")["filter"] for out in ("run", "straight")]
    assert states[0] == states[1] and len(states[0]["history"]) == 24


@pytest.mark.parametrize("no_score", [True, False])
def test_twenty_steps_in_vain_end_with_what_fits(failing, not_taken, capsys, no_score):
    steps = ("--steps", 40, "--save-every", 0, "--micro-batch", 99)
    if no_score:
        failing("geneval:partial", 2, lambda: {"reward": torch.full((16,), float("nan")),
                                               "geneval:partial": torch.full((16,), float("nan"))})
    else:
        not_taken(*range(2, 40))
    said = refused(train, *TINY, *steps, "--out", "run")
    assert said.startswith("20 steps in a row were not taken") and "checkpoint in run, " in said
    assert ("--lr" in said) != no_score and ("no score" in said) == no_score
    assert [folder.name for folder in support.run.checkpoints("run")] == ["checkpoint-22"]
    rows = metrics(Path("run"))
    assert [row["taken"] for row in rows] == [1] * 2 + [0] * 20
    assert no_score or rows[2]["grad_norm"] is None
    assert no_score or capsys.readouterr().out.count("NOT TAKEN: not finite") == 20


def test_a_reader_that_ends_before_the_run_loses_no_step(monkeypatch):
    """As `| tee`, when Ctrl-C ends both, or a terminal that is closed."""
    def write(text):
        raise BrokenPipeError
    calls, plain = [], train.update

    def update(*args):
        calls.append(0)
        if len(calls) == 2:
            monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=write))
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args)
    monkeypatch.setattr(train, "update", update)
    with pytest.raises(SystemExit):
        call("--steps", 4, "--save-every", 0, "--out", "run")
    assert [folder.name for folder in support.run.checkpoints("run")] == ["checkpoint-2"]
    assert len(metrics(Path("run"))) == 2


def test_a_program_whose_reader_is_gone_ends_well():
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from support import processes; "
            "processes.run(lambda: (time.sleep(1), print('x')))")
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" | true; exit ${PIPESTATUS[0]}',
                           sys.executable, code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stderr) == (0, "")


def test_a_judge_s_answer_that_one_process_could_not_read_ends_all(monkeypatch):
    monkeypatch.setattr(train, "all_lists", lambda mine: [*mine, "no idea"])
    read = SimpleNamespace(unread="")
    assert "'no idea'" in train.in_vain(1, {"reward_mean": float("nan")}, read, "out")
    assert train.in_vain(1, {"reward_mean": 1.0}, read, "out") is None


def test_a_stop_does_not_evaluate_and_the_resumed_run_does(monkeypatch):
    plain, flags = train.update, ("--eval-every", 2, "--steps", 4, "--save-every", 0,
                                  "--eval-prompts", "few.jsonl")
    call(*flags, "--out", "straight")

    def update(*args):
        if len(metrics(Path("run"))) == 1:              # in the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)
    monkeypatch.setattr(train, "update", update)
    with pytest.raises(SystemExit) as end:
        call(*flags, "--out", "run")
    assert end.value.code == 128 + signal.SIGTERM
    assert [folder.name for folder in support.run.checkpoints("run")] == ["checkpoint-2"]
    evaluated = [row["step"] for row in support.run.read_rows(Path("run/eval.jsonl"))]
    assert evaluated == [0]
    del end
    gc.collect()
    monkeypatch.setattr(train, "update", plain)
    call(*flags, "--out", "run", "--resume")
    assert Path("run/eval.jsonl").read_bytes() == Path("straight/eval.jsonl").read_bytes()


def test_a_signal_ends_an_evaluation_at_once_and_saves(monkeypatch):
    plain = train.draw_and_score

    def draw_and_score(step, *args):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return plain(step, *args)
    monkeypatch.setattr(train, "draw_and_score", draw_and_score)
    with pytest.raises(SystemExit):
        call("--eval-every", 2, "--eval-prompts", "few.jsonl", "--save-every", 0, "--steps", 4,
             "--out", "run")
    assert [folder.name for folder in support.run.checkpoints("run")] == ["checkpoint-2"]


def test_a_full_disk_is_one_line(monkeypatch):
    plain = torch.save

    def save(state, path, *args):
        if path.name == "optimizer.pt" and "-2" in path.parent.name:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64")
        plain(state, path, *args)
    monkeypatch.setattr(support.run.torch, "save", save)
    free = shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr(support.run.shutil, "disk_usage", lambda path: free)
    assert refused(train, *MANY, "--steps", 3) == (
        "run/.checkpoint-2: cannot be written (no space left); the checkpoints before it are whole")
    assert sorted(path.name for path in Path("run").glob("*checkpoint*")) == ["checkpoint-1"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_for_rows_and_pictures_is_one_line(monkeypatch, capsys, number):
    monkeypatch.setattr(processes.os, "_exit", sys.exit)

    def main():
        raise OSError(number, os.strerror(number), "runs/x/metrics.jsonl")
    with pytest.raises(SystemExit):
        processes.run(main)
    assert capsys.readouterr().err == "runs/x/metrics.jsonl: no space left\n"


# ------------------------------------------------------------------------------ how it goes on

def test_a_resumed_run_says_what_changed(capsys):
    call("--out", "run")
    call("--out", "run", "--resume", "--steps", 2)
    assert "changed since" not in capsys.readouterr().out
    call("--out", "run", "--resume", "--steps", 3, "--ratio", "mean", "--lr", 7e-4, "--filter-low",
         "--reward", "clip:shapes/clip", "--prompts", "few.jsonl", "--loss-steps", 2)
    line, = re.findall("changed since: (.*)", capsys.readouterr().out)
    assert {said for said in line.split(", ") if said.startswith("--")} == {
        "--ratio sum -> mean", "--lr 0.001 -> 0.0007", "--filter-low False -> True", "--steps 2 -> "
        "3", "--reward geneval:partial:1 -> clip:shapes/clip:1", "--loss-steps None -> 2",
        "--eval-reward geneval:partial:1 -> clip:shapes/clip:1",
        "--prompts shapes/train.jsonl -> few.jsonl"}
    assert re.search(r", texts of the prompts \w+ -> \w+(,|$)", line)


def test_one_command_serves_the_first_start_and_a_restart(capsys):
    command = ("--out", "run", "--resume")
    call(*command)
    assert "--resume: there is no checkpoint in run, the run begins anew" in capsys.readouterr().out
    call(*command, "--steps", 3)
    call("--resume", "run", "--steps", 4)       # the run's folder, too, can be given
    assert [row["step"] for row in metrics(Path("run"))] == [1, 2, 3, 4]


def test_of_the_optimizer_s_file_the_state_counts_not_the_settings_and_it_is_let_go(monkeypatch):
    call("--out", "run", "--steps", 2)
    groups, maps, plain, plain_update = [], [], train.load_policy, train.update

    def load_policy(*args):
        loaded = plain(*args)
        groups.append({k: v for k, v in loaded[3].param_groups[0].items() if k != "params"})
        return loaded

    def update(*args):
        maps.append(Path("/proc/self/maps").read_text())
        return plain_update(*args)
    monkeypatch.setattr(train, "load_policy", load_policy)
    monkeypatch.setattr(train, "update", update)
    path = Path("run/checkpoint-2/optimizer.pt")
    state = torch.load(path, weights_only=True)
    state["param_groups"][0].update(fused=True, lr=9.0, betas=(0.5, 0.5), weight_decay=3.0)
    torch.save(state, path)
    call("--out", "run", "--resume", "--steps", 3)
    assert not groups[0]["fused"] and groups[0]["betas"] == (0.9, 0.95)
    assert groups[0]["weight_decay"] == 0 and groups[0]["lr"] == 1e-3
    assert len(maps) == 1 and "optimizer.pt" not in maps[0] and "trainer.pt" not in maps[0]


# ------------------------------------------------------------------------------ what starts it

@pytest.mark.parametrize("given", [{"SLURM_STEP_NUM_TASKS": "4"}, {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_other_launchers_are_told_apart(monkeypatch, given):
    for name in ("WORLD_SIZE", "RANK", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")         # an allocation sets it, too
    assert processes.setup("cpu")[:2] == (0, 1)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="start with torchrun"):
        processes.setup("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")           # torchrun under srun
    assert processes.setup("cpu")[:2] == (0, 1)


def test_a_launcher_s_flag_is_taken_and_ignored():
    call("--local-rank=0", "--local_rank=0", "--steps", 1, "--out", "run")
    assert "local_rank" not in trainer(Path("run/checkpoint-1"))["args"]


@pytest.mark.parametrize("visible, local_rank, wanted", [(1, "1", 0), (8, "3", 3), (1, "0", 0)])
def test_a_process_takes_the_gpu_that_it_sees(monkeypatch, visible, local_rank, wanted):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    _, _, device = processes.setup("cuda")
    assert device == taken[0] == torch.device("cuda", wanted)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_files_are_replaced_as_windows_demands(monkeypatch):
    """There, rename() fails where the target is."""
    def rename(self, target):
        raise FileExistsError(target)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(os, "rename", rename)
    call("--out", "run", "--keep-last", 1)
    call("--out", "run", "--resume", "--steps", 3, "--keep-last", 1)
    run(sample, *SAMPLE, "--out", "drawn")
    assert len(metrics(Path("run"))) == 3 and len(files_of("drawn")) == 8


def finish(*started):
    """Wait for them -> what each printed, and their exit codes."""
    printed = [process.communicate(timeout=120)[0] for process in started]
    return printed, [process.returncode for process in started]


def test_two_machines_with_one_folder():
    run(train, *MANY, "--prompts-per-step", 2)
    printed, codes = finish(*(torchrun(
        ".", ROOT / "train.py", *MANY, "--steps", 3, "--resume", node=node) for node in (0, 1)))
    assert codes == [0, 0] and [row["step"] for row in metrics(Path("run"))] == [1, 2, 3]


def test_a_machine_without_the_checkpoint_ends_the_run(monkeypatch):
    args = SimpleNamespace(resume="auto", out="run", model="shapes", seed=1)
    monkeypatch.setattr(support.run, "of_first", lambda chosen: (Path("run"), Path("run/check-3")))
    with pytest.raises(SystemExit, match="run/check-3 is not on the machine of process 0; every"):
        support.run.open_run(args)


PADDED = f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from support import processes, run
import train
plain_update, plain_write = train.update, run.write_checkpoint

def pause(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)

def update(*args):
    print("updating", processes.rank(), flush=True)
    pause(1.5)
    return plain_update(*args)

def write_checkpoint(*args):
    print("saving", flush=True)
    pause(2)
    plain_write(*args)
train.update, run.write_checkpoint = update, write_checkpoint
processes.run(train.main)
"""


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_torchrun_passes_a_signal_on_in_a_slow_step_and_it_comes_again_in_a_slow_save():
    """As of SLURM and Kubernetes, which signal torchrun and all workers."""
    Path("padded.py").write_text(PADDED)
    started = torchrun(".", "padded.py", *MANY, "--steps", 50, "--save-every", 0, n=2)
    printed, workers = "", []
    for line in started.stdout:
        printed += line
        if printed.count("updating") == 4 and not workers:      # both in their second step
            workers = children(started.pid)
            started.send_signal(signal.SIGTERM)
        if line.startswith("saving"):
            time.sleep(1.2)
            for pid in workers:
                os.kill(pid, signal.SIGTERM)
    started.wait(60)
    assert len(workers) == 2 and started.returncode != 0
    assert "stopped by a signal after step 2; go on with --resume --out run" in printed
    folder, = support.run.checkpoints("run")
    assert folder.name == "checkpoint-2" and json.loads((folder / "config.json").read_text())
    assert (folder / "trainer.pt").exists() and not list(Path("run").glob(".*"))
    assert not list(Path("run").rglob("*.part"))


def test_a_signal_in_a_save_ends_the_run_before_anything_else(monkeypatch):
    plain = support.run.write_checkpoint

    def write_checkpoint(out, step, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        plain(out, step, *rest)
    monkeypatch.setattr(support.run, "write_checkpoint", write_checkpoint)
    flags = ("--eval-every", 1, "--steps", 3, "--eval-prompts", "few.jsonl", "--out", "run")
    with pytest.raises(SystemExit) as end:
        call(*flags)
    assert end.value.code == 128 + signal.SIGTERM and len(metrics(Path("run"))) == 1
    assert [row["step"] for row in support.run.read_rows(Path("run/eval.jsonl"))] == [0]


def test_epochs_that_were_taken_count(monkeypatch):
    """The second of two optimizer steps on the same rollouts is not finite: the first is kept."""
    plain, norms = torch.nn.utils.clip_grad_norm_, []

    def clip_grad_norm(params, most):
        norms.append(plain(params, most))
        return norms[-1] * (float("nan") if len(norms) % 2 == 0 else 1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm)
    call("--inner-epochs", 2, "--steps", 1, "--save-every", 0, "--out", "run")
    assert metrics(Path("run"))[0]["taken"] == 1
    assert not helpers.equal(weights(Path("run/checkpoint-1")), weights(ROOT / "shapes"))


def test_before_and_after_are_of_this_run_and_only_two_grids_are_opened(monkeypatch):
    opened, plain = [], Image.open
    monkeypatch.setattr(support.run.Image, "open", lambda path: opened.append(path) or plain(path))
    flags = ("--eval-every", 1, "--eval-prompts", "few.jsonl", "--out", "run")
    call(*flags, "--steps", 3)
    assert [path.name for path in opened] == ["step-000000.png", "step-000003.png"]
    call(*flags, "--steps", 2, "--resume", "run/checkpoint-2")
    grids = sorted(path.name for path in Path("run/samples").iterdir())
    assert grids == ["before_after.png", *(f"step-00000{i}.png" for i in range(3))]


def test_two_commands_at_once_do_not_draw_into_one_folder():
    Path("out").mkdir()
    lock = support.run.lock_folder(Path("out"))
    for script, flags in ((eval_geneval, GENEVAL), (sample, SAMPLE)):
        assert "another run is in it" in refused(script, *flags, "--out", "out")
    lock.release()
    run(sample, *SAMPLE, "--out", "out")


def test_pictures_are_scored_by_the_prompts_that_they_were_drawn_from():
    run(sample, *SAMPLE, "--out", "drawn")
    score = ("--reward", f"clip:{ROOT}/shapes/clip", "--images", "drawn", "--prompts")
    assert "was drawn from 3 prompts" in refused(reward, *score, "other.jsonl")
    for path in list(Path("drawn").glob("*-01.png"))[:3]:
        path.unlink()       # one of two, of each prompt
    assert re.search("2 pictures each, not .*, 1 each", refused(reward, *score, "few.jsonl"))


def test_a_command_that_drew_nothing_does_not_claim_the_folder():
    run(sample, *SAMPLE, "--out", "drawn")
    for path in Path("drawn").glob("*.png"):
        path.unlink()
    run(sample, *SAMPLE, "--out", "drawn", "--seed", 5)
    assert json.loads(Path("drawn/drawn.json").read_text())["seed"] == 5


def test_what_is_scored_is_checked():
    run(eval_geneval, *GENEVAL, "--out", "out")
    path = Path("out/00001/metadata.jsonl")
    example = json.loads(path.read_text())
    for change, message in (({"include": [{"class": "unicorn", "count": 1}]}, "not .*unicorn"),
                            ({"tag": None}, "")):
        path.write_text(json.dumps({k: v for k, v in (example | change).items() if v is not None}))
        said = refused(eval_geneval, "--model", "shapes", "--score-only", "out")
        assert said.startswith("GenEval's rules need a tag") and re.search(message, said)
    assert "draws nothing" in refused(eval_geneval, "--score-only", "out", "--out", "x")


def test_a_process_that_fails_before_the_others_are_there_says_so():
    """The second of two processes has no such device."""
    Path("dev.py").write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
from support import processes
processes.run(lambda: processes.setup("cuda:7" if os.environ["RANK"] == "1" else "cpu"))
""")
    printed, codes = finish(torchrun(".", "dev.py", n=2))
    assert 0 not in codes and printed[0].count("--device cuda:7: there is none") == 1


def test_a_resumed_run_does_without_the_weights_that_it_began_with(trained):
    shutil.copytree(trained, "base")
    call("--ckpt", "base", "--out", "run")
    shutil.rmtree("base")
    call("--ckpt", "base", "--out", "run", "--resume", "--steps", 3)
    assert [row["step"] for row in metrics(Path("run"))] == [1, 2, 3]
