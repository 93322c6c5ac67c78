"""train.py: a run end to end at tiny size, its variants, its parts against plain formulas, and bad
input."""
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, metrics
from PIL import Image

import checkpoint
import common
import train
from grpo import clipped_objective, group_advantages, kl_k3
from model import load_showo
from sample import forward_trajectory, rollout, transition_log_prob

TINY = ("--model shapes --no-kl --steps 2 --prompts-per-step 3 --group-size 4 --unmask-steps 4 "
        "--eval-every 0 --eval-unmask-steps 4 --sample-every 0").split()


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *map(str, flags)])
    train.main()


def weights(folder):
    return torch.cat([p.flatten() for p in load_showo(folder).parameters()])


# ------------------------------------------------------------------------------ whole runs

def test_a_run_leaves_what_the_readme_says(monkeypatch, tmp_path, capsys):
    out = tmp_path / "run"
    call(monkeypatch, "--out", out, "--eval-every", 1, "--eval-n", 1, "--sample-every", 2,
         "--save-every", 1, "--filter-low", "--lr", 1e-3, "--prompts-per-step", 8,
         "--unmask-steps", 8)
    rows, evals = metrics(out), checkpoint.read_rows(out / "eval.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and [row["step"] for row in evals] == [0, 1, 2]
    assert set(rows[0]) >= {
        "reward_mean", "reward_std", "adv_zero", "approx_kl", "clip_fraction", "ratio_mean",
        "ratio_max", "grad_norm", "entropy", "lr", "objects", "objects_asked", "geneval:exact"}
    assert rows[0]["ratio_mean"] == rows[0]["ratio_max"] == 1 and rows[0]["approx_kl"] == 0
    assert set(evals[0]) >= {"overall", "exact", "objects", *train.shapes.FAMILIES}

    samples = sorted(file.name for file in (out / "samples").iterdir())
    assert samples == ["before_after.png", "step-000000.png", "step-000002.png"]
    moved = weights(out / "checkpoint-2") - weights(ROOT / "shapes")
    assert 0 < moved.abs().max() < 0.01
    said = capsys.readouterr().out
    assert "before -> after" in said and "peak memory" in said
    assert ("8 prompts x 4 = 32 pictures, x 8 of 8 iterations = 256 trajectory steps, over all "
            "processes") in said


def test_the_flags_that_a_run_prints_start_it_again(monkeypatch, tmp_path, capsys):
    call(monkeypatch, "--out", tmp_path / "a", "--recipe", "best", "--steps", 1)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("--"))
    again = [word.replace(str(tmp_path / "a"), str(tmp_path / "b")) for word in line.split()]
    monkeypatch.setattr(sys, "argv", ["train.py", *again])
    train.main()
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_resume_is_exact_and_repeats_nothing(monkeypatch, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ("--save-every", 2, "--filter-low", "--filter-warmup", 4, "--max-resample", 2,
             "--steps", 4, "--lr", 1e-3)
    call(monkeypatch, "--out", straight, *flags)
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    call(monkeypatch, "--out", resumed, "--resume", *flags)
    first, middle, again = (weights(folder) for folder in (
        straight / "checkpoint-4", straight / "checkpoint-2", resumed / "checkpoint-4"))
    assert torch.equal(first, again) and not torch.equal(first, middle)
    assert metrics(straight) == metrics(resumed) and len(metrics(resumed)) == 4


def on_policy(row):
    return row["ratio_mean"] == 1 and row["grad_norm"] > 0


def off_policy(row):
    return row["ratio_max"] != 1 and row["approx_kl"] > 0 and row["clip_fraction"] > 0


def of_the_mean_token(row):
    return 0 < row["approx_kl"] < 0.1


@pytest.mark.parametrize("flags, check", [
    (["--inner-epochs", 2, "--lr", 3e-3, "--warmup", 1], off_policy),
    (["--transition", "p1"], on_policy),
    (["--transition", "ar"], on_policy),
    (["--loss-steps", 2, "--loss-steps-from", "random"], on_policy),
    # more iterations than tokens
    (["--unmask-steps", 40, "--prompts-per-step", 4, "--transition", "p1"], on_policy),
    (["--trajectory", "forward", "--loss-steps", 2], on_policy),
    (["--adv", "mean", "--ratio", "mean", "--inner-epochs", 2], of_the_mean_token),
    (["--dtype", "bf16"], on_policy),
    (["--grad-checkpoint"], on_policy)])
def test_variants_run(monkeypatch, tmp_path, flags, check):
    call(monkeypatch, "--out", tmp_path / "run", "--prompts-per-step", 8, *flags)
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2 and all(check(row) for row in rows)


def test_kl_holds_the_policy_to_the_reference(monkeypatch, tmp_path):
    call(monkeypatch, "--out", tmp_path / "run", "--kl", "--steps", 3, "--lr", 1e-3,
         "--kl-beta", 0.1)
    rows = metrics(tmp_path / "run")
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-9) and rows[2]["kl_ref"] > 1e-5


def test_the_reward_sees_its_own_prompt(monkeypatch, tmp_path):
    """reward_prompt and metadata of a prompt file, each beside its own pictures."""
    lines = [{"prompt": f"a photo of a {word}", "reward_prompt": f"scored as {word}", "tag": word,
              "include": []} for word in ("star", "moon", "circle")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = []

    def make_reward(*_, **__):
        def reward(images, prompts, metadata):
            asked.extend(zip(prompts, [entry["tag"] for entry in metadata], strict=True))
            return torch.arange(len(images)) % 2.0
        reward.log = {}
        return reward
    monkeypatch.setattr(train, "make_reward", make_reward)
    call(monkeypatch, "--out", tmp_path / "run", "--prompts", tmp_path / "p.jsonl", "--steps", 1,
         "--reward", "clip")
    assert len(asked) == 12
    assert set(asked) == {(line["reward_prompt"], line["tag"]) for line in lines}
    assert all(asked[i] == asked[i - i % 4] for i in range(12))     # a group's pictures together


# ------------------------------------------------------------------------------ flags

def parsed(monkeypatch, *flags):
    """Return the flags of a command line as a dict."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "shapes", *flags])
    return vars(train.parse_args())


def test_a_recipe_sets_flags_and_flags_beside_it_win(monkeypatch):
    no_recipe = parsed(monkeypatch)
    assert no_recipe["recipe"] is None and no_recipe["kl"] and not no_recipe["filter_low"]
    by_hand = parsed(monkeypatch, "--transition", "p1", "--no-kl", "--filter-low")
    assert parsed(monkeypatch, "--recipe", "paper") == by_hand | {"recipe": "paper"}
    best = no_recipe | train.RECIPES["best"] | {"recipe": "best"}
    assert parsed(monkeypatch, "--recipe", "best") == best
    assert parsed(monkeypatch, "--recipe", "best", "--ratio", "sum")["ratio"] == "sum"
    changed = parsed(monkeypatch, "--recipe", "paper", "--transition", "p2", "--kl",
                     "--no-filter-low")
    assert changed == no_recipe | {"recipe": "paper"}


def arguments(**changes):
    """Return flags for the parts of train.py."""
    flags = dict(
        train.PRESETS["shapes"], group_size=4, unmask_steps=4, transition="p2",
        trajectory="rollout", adv="std", ratio="sum", inner_epochs=1, loss_steps=None,
        loss_steps_from="first", micro_batch=5, clip_low=0.9, clip_high=1.2, max_grad_norm=0,
        kl_beta=0.0, seed=0, guidance=0.0, confidence="probability")
    return SimpleNamespace(**flags | changes)


def test_loss_iterations():
    args = arguments(unmask_steps=8, loss_steps=3)
    assert train.loss_iterations(0, args) == [0, 1, 2]
    args.loss_steps_from = "last"
    assert train.loss_iterations(0, args) == [5, 6, 7]
    assert train.loss_iterations(0, arguments(unmask_steps=8)) == list(range(8))

    args.loss_steps_from = "random"
    draws = [train.loss_iterations(step, args) for step in range(400)]
    assert all(len(set(draw)) == 3 for draw in draws) and len(set(map(tuple, draws))) > 40
    share = torch.bincount(torch.tensor(draws).flatten(), minlength=8) / 400
    assert (share - 3 / 8).abs().max() < 0.09       # every iteration as often: an unbiased estimate


def test_every_prompt_has_its_turn():
    examples = [{"prompt": str(i)} for i in range(7)]
    slots = [train.example_at(slot, examples, seed=1)["prompt"] for slot in range(21)]
    for epoch in range(3):
        assert sorted(slots[7 * epoch:7 * epoch + 7]) == list("0123456")
    assert slots[:7] != slots[7:14]
    assert slots != [train.example_at(slot, examples, seed=2)["prompt"] for slot in range(21)]


# ------------------------------------------------------------------------------ the update

def batch_of_rollouts(showo, args):
    """Return 4 groups of 4 pictures with rewards drawn at random."""
    examples = train.shapes.prompts("train", 4)
    prompt = showo.encode([example["prompt"] for example in examples]).repeat(4)
    with torch.no_grad():
        traj = rollout(showo.policy(prompt), 16, showo.N, showo.K, args.unmask_steps,
                       keep_sampled=True, generator=torch.Generator().manual_seed(0))
    # away from the probabilities of ground, which are so many and so equal that rounding decides
    # whether one is under the threshold
    traj.threshold *= 0.5
    rewards = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    return train.Batch(examples, traj, rewards, {}), prompt


def gradient_of_update(showo, batch, args, reference=None):
    """Return the gradient that the optimizer meets in update()."""
    taken = []
    optimizer = torch.optim.SGD(showo.parameters(), lr=0.0)

    def step():
        taken.append(torch.cat([p.grad.flatten() for p in showo.parameters()]))
    optimizer.step = step
    train.update(0, batch, args, showo, reference, optimizer)
    gradient, = taken
    return gradient


def another_showo():
    """Return the base with other weights, frozen."""
    showo = load_showo("shapes").requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for p in showo.parameters():
        p += 0.01 * p.std() * torch.randn(p.shape, generator=g) if p.numel() > 1 else 0
    return showo


def log_probs(showo, prompt, traj, iterations, kind):
    """Return log-probabilities of moves from whole states, Float[B, T]."""
    return torch.stack([
        transition_log_prob(showo.logits(traj.state(t, showo.K), prompt), traj.codes, traj.order,
                            t, kind, threshold=traj.threshold, sampled=traj.sampled)
        for t in iterations], 1)


@pytest.mark.parametrize("kind, iterations, flags", [
    ("p1", range(4), {}), ("p2", range(4), {}), ("ar", range(4), {}),
    ("forward", range(4), {}),
    ("p2", range(2), dict(loss_steps=2)),
    ("p1", range(2, 4), dict(loss_steps=2, loss_steps_from="last")),
    ("p2", range(4), dict(kl_beta=0.1)), ("p2", range(4), dict(adv="mean"))])
def test_update_is_the_gradient_of_equation_10(kind, iterations, flags):
    """Micro-batches over rows and iterations against Eq. 10 written in one expression."""
    showo, args = load_showo("shapes"), arguments(**flags)
    batch, prompt = batch_of_rollouts(showo, args)
    if kind == "forward":
        args.trajectory, args.transition, kind = "forward", "p1", "ar"
        batch.traj = forward_trajectory(batch.traj.codes, 4, [torch.Generator().manual_seed(0)])
    else:
        args.transition = kind
    reference = another_showo() if args.kl_beta else None
    taken = gradient_of_update(showo, batch, args, reference)

    logp = log_probs(showo, prompt, batch.traj, iterations, kind)
    adv = group_advantages(batch.rewards, args.adv).flatten()
    objective = clipped_objective(logp, logp, adv)
    if reference:
        logp_ref = log_probs(reference, prompt, batch.traj, iterations, kind)
        objective = objective - args.kl_beta * kl_k3(logp, logp_ref)
    (-objective).backward()
    wanted = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                        for p in showo.parameters()])
    assert (taken - wanted).norm() < 1e-5 * wanted.norm() and wanted.norm() > 0


@pytest.mark.parametrize("how", ["grad_checkpoint", "bf16"])
def test_cheaper_updates_have_the_same_gradient(how):
    args, gradients, passes = arguments(kl_beta=0.1), [], []
    for cheap in (False, True):
        showo, reference = load_showo("shapes"), load_showo("shapes").requires_grad_(False)
        batch, _ = batch_of_rollouts(showo, args)
        showo.grad_checkpoint = cheap and how == "grad_checkpoint"
        showo.compute_dtype = torch.bfloat16 if cheap and how == "bf16" else None
        calls = []
        showo.showo.model.layers[0].mlp.fc1.register_forward_hook(
            lambda *_, calls=calls: calls.append(1))
        gradients.append(gradient_of_update(showo, batch, args, reference))
        passes.append(len(calls))
    exact, cheaper = gradients
    tolerance = 1e-5 if how == "grad_checkpoint" else 5e-2
    assert (cheaper - exact).norm() < tolerance * exact.norm() and exact.norm() > 0
    if how == "grad_checkpoint":    # layers did run again
        assert passes[1] > 1.5 * passes[0]


def test_only_groups_under_the_bar_are_sampled_again(base):
    args = arguments(filter_low=True, max_resample=2)
    examples = train.shapes.prompts("train", 4)
    stds = iter([[0.0, 1, 1, 0.0], [1, 0.0], [0.0]])    # per attempt, of the groups sampled in it

    def reward(images, prompts, metadata):
        spread = torch.tensor(next(stds))
        assert len(images) == 4 * len(spread)
        reward.log = {"part": spread.repeat_interleave(4)}
        return (spread[:, None] * torch.tensor([-1.0, 1, -1, 1])).flatten()

    bar = train.SampleFilter(percentile=50, warmup=1)
    bar.history = [0.5] * 100
    clock = train.Clock(torch.device("cpu"))
    batch, n_resampled = train.collect(0, examples, args, *base, reward, bar, clock)
    assert n_resampled == 3 and next(stds, None) is None
    assert (batch.rewards.std(1) > 0).tolist() == [True, True, True, False]
    assert batch.parts["part"][:, 0].tolist() == [1, 1, 1, 0]
    assert len(bar.history) == 107


# ------------------------------------------------------------------------------ bad input

def write_places(folder):
    """Write what the command lines below name in capitals; return where."""
    texts = {"EMPTY": ("empty.txt", "\n"),
             "BROKEN": ("broken.jsonl", '{"prompt": "x"}\n{"prompt"\n'),
             "NOPROMPT": ("noprompt.jsonl", '{"text": "x"}\n'),
             "PLAIN": ("plain.txt", "a photo of a red circle\n"),
             "OTHER": ("other/metrics.jsonl", '{"step": 1}\n')}
    places = {}
    for word, (name, text) in texts.items():
        places[word] = folder / name
        places[word].parent.mkdir(exist_ok=True)
        places[word].write_text(text)
    places["OTHER"] = folder / "other"
    places["EMPTYRUN"], places["CHECKPOINT"] = folder / "emptyrun", folder / "run/checkpoint-2"
    for word in ("EMPTYRUN", "CHECKPOINT"):
        places[word].mkdir(parents=True)

    values = ("shapes", 4, 4, "p2", "rollout", 1, False, None, 42)
    saved = dict(zip(checkpoint.MUST_MATCH, values, strict=True))
    torch.save({"step": 2, "args": saved, "world": 1, "n_bad": 0, "optimizer": {},
                "filter": {"history": []}}, places["CHECKPOINT"] / "trainer.pt")
    return places


@pytest.mark.parametrize("flags, message", [
    (["--group-size", "1"], "--group-size: 1 is out of range"),
    (["--group-size", "x"], "--group-size: 'x' is not a whole number"),
    (["--filter-percentile", "101"], "--filter-percentile: 101 is out of range"),
    (["--steps", "0"], "--steps: 0 is out of range"),
    (["--loss-steps", "5"], "--loss-steps 5 is more than --unmask-steps 4"),
    (["--transition", "gumbel"], "--transition: invalid choice: 'gumbel'"),
    (["--zero"], "--zero shards over processes: start with torchrun"),
    (["--prompts", "absent.txt"], "--prompts absent.txt: cannot be read"),
    (["--prompts", "EMPTY"], "no prompts in it"),
    (["--prompts", "BROKEN"], "line 2 is not JSON"),
    (["--prompts", "NOPROMPT"], 'line 1 has no "prompt"'),
    (["--prompts", "PLAIN"], "plain.txt: prompt 1 lacks GenEval metadata"),
    (["--eval-prompts", "PLAIN"], "plain.txt: prompt 1 lacks GenEval metadata"),
    (["--reward", "beauty"], "'beauty' is not known"),
    (["--out", "OTHER"], "holds another run"),
    (["--resume"], "--resume without a checkpoint needs --out"),
    (["--resume", "absent"], "absent: no checkpoint of train.py"),
    (["--resume", "--out", "EMPTYRUN"], "no checkpoint in"),
    (["--resume", "CHECKPOINT", "--group-size", "8"], "that run has --group-size 4, not 8"),
    (["--resume", "CHECKPOINT", "--kl"], "that run has --kl False, not True"),
    (["--resume", "CHECKPOINT", "--model", "other/model"],
     "that run has --model shapes, not other/model"),
    (["--vq", "nowhere"], "nowhere: no such file or folder")])
def test_bad_input_is_one_line_and_exit_2(monkeypatch, tmp_path, capsys, flags, message):
    places = write_places(tmp_path)
    flags = [str(places.get(flag, flag)) for flag in flags]
    before = sorted((str(f), f.stat().st_mtime_ns) for f in tmp_path.rglob("*"))
    if "--out" not in flags and "--resume" not in flags:
        flags += ["--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *flags])
    with pytest.raises(SystemExit) as stopped:
        common.run(train.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said
    assert said.count("\n") == 1 and "Traceback" not in said
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert sorted((str(f), f.stat().st_mtime_ns) for f in tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------ other commands

def command(tmp_path, script, *flags):
    """Return what a script prints that is started from another folder."""
    done = subprocess.run([sys.executable, ROOT / script, "--model", "shapes", *flags],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sample_is_a_command(tmp_path):
    command(tmp_path, "sample.py", "--prompt", "a photo of a red circle", "--n", "4", "--steps",
            "4", "--out", "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (2 * 148, 2 * 176)


def test_eval_geneval_is_a_command(tmp_path):
    said = command(tmp_path, "eval_geneval.py", "--n", "1", "--steps", "4", "--out", "eval")
    rows = [json.loads(line)
            for line in (tmp_path / "eval/results.jsonl").read_text().splitlines()]
    assert len(rows) == 63 and "Overall score" in said
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata",
                             "details"]
    assert (tmp_path / "eval/00062/samples/0000.png").exists()
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert summary["detector"] == "shapes, exact"
