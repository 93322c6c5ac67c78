"""train.py end to end at tiny size: files, resume, reductions, filter, two processes, bad input, the README's example."""
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, metrics

import checkpoint
import train
from model import load_showo
from sample import remask, rollout, run, temperatures

TINY = "--model shapes --no-kl --steps 2 --prompts-per-step 3 --group-size 4 --unmask-steps 4 --eval-every 0 --sample-every 0".split()


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *map(str, flags)])
    train.main()


def weights(folder):
    return torch.cat([p.flatten() for p in load_showo(folder).parameters()])


def test_a_run_leaves_what_the_readme_says(monkeypatch, tmp_path, capsys):
    out = tmp_path / "run"
    call(monkeypatch, "--out", out, "--eval-every", 1, "--eval-n", 1, "--sample-every", 2, "--save-every", 1, "--filter-low", "--lr", 1e-3,
         "--prompts-per-step", 8, "--unmask-steps", 8)
    rows, evals = metrics(out), checkpoint.read_rows(out / "eval.jsonl")
    assert [r["step"] for r in rows] == [1, 2] and [r["step"] for r in evals] == [0, 1, 2]
    for name in ("reward_mean", "reward_std", "adv_zero", "approx_kl", "clip_fraction", "ratio_mean", "ratio_max", "grad_norm", "entropy", "lr",
                 "objects", "objects_asked", "geneval:exact"):
        assert name in rows[0]
    assert rows[0]["ratio_mean"] == rows[0]["ratio_max"] == 1 and rows[0]["approx_kl"] == 0
    assert set(evals[0]) >= {"overall", "exact", "objects", *train.shapes.FAMILIES}
    assert sorted(f.name for f in (out / "samples").iterdir()) == ["before_after.png", "step-000000.png", "step-000002.png"]
    moved = weights(out / "checkpoint-2") - weights(ROOT / "shapes")
    assert 0 < moved.abs().max() < 0.01
    text = capsys.readouterr().out
    assert "before -> after" in text and "peak memory" in text and "8 prompts x 4 = 32 pictures, x 8 of 8 iterations = 256 trajectory steps" in text


def test_resume_is_exact_and_repeats_nothing(monkeypatch, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ("--save-every", 2, "--filter-low", "--filter-warmup", 4, "--max-resample", 2, "--steps", 4, "--lr", 1e-3)
    call(monkeypatch, "--out", straight, *flags)
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    call(monkeypatch, "--out", resumed, "--resume", *flags)
    assert torch.equal(weights(straight / "checkpoint-4"), weights(resumed / "checkpoint-4"))
    assert metrics(straight) == metrics(resumed) and len(metrics(resumed)) == 4
    assert not torch.equal(weights(straight / "checkpoint-4"), weights(straight / "checkpoint-2"))


@pytest.mark.parametrize("flags, check", [
    (["--inner-epochs", 2, "--lr", 3e-3, "--warmup", 1], lambda r: r["ratio_max"] != 1 and r["approx_kl"] > 0 and r["clip_fraction"] > 0),
    (["--transition", "p1"], lambda r: r["ratio_mean"] == 1 and r["grad_norm"] > 0),
    (["--transition", "ar"], lambda r: r["ratio_mean"] == 1 and r["grad_norm"] > 0),
    (["--loss-steps", 2, "--loss-steps-from", "random"], lambda r: r["grad_norm"] > 0),
    (["--unmask-steps", 20], lambda r: r["ratio_mean"] == 1 and r["grad_norm"] > 0),       # more iterations than tokens
    (["--transition", "gumbel"], lambda r: r["ratio_mean"] == 1 and r["grad_norm"] > 0),
    (["--trajectory", "forward", "--loss-steps", 2], lambda r: r["ratio_mean"] == 1 and r["grad_norm"] > 0),
    (["--loss-steps", 2, "--loss-steps-from", "critical"], lambda r: r["grad_norm"] > 0),
    (["--adv", "mean", "--ratio", "mean", "--inner-epochs", 2], lambda r: 0 < r["approx_kl"] < 0.1),
    (["--dtype", "bf16"], lambda r: r["ratio_mean"] == 1 and r["grad_norm"] > 0)])
def test_variants_run(monkeypatch, tmp_path, flags, check):
    call(monkeypatch, "--out", tmp_path / "run", "--prompts-per-step", 8, *flags)
    assert all(check(row) for row in metrics(tmp_path / "run"))


def test_kl_holds_the_policy_to_the_reference(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py", *[f for f in TINY if f != "--no-kl"], "--out", str(tmp_path / "run"), "--steps", "3", "--lr", "1e-3",
                                      "--kl-beta", "0.1"])
    train.main()
    rows = metrics(tmp_path / "run")
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-9) and rows[2]["kl_ref"] > 1e-5


def test_a_recipe_sets_flags_and_flags_beside_it_win(monkeypatch):
    def parsed(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", "shapes", *flags])
        return vars(train.parse_args())
    plain, no_recipe = parsed("--transition", "p1", "--no-kl", "--filter-low"), parsed()
    assert parsed("--recipe", "paper") == plain | {"recipe": "paper"} and no_recipe["recipe"] is None and not no_recipe["filter_low"]
    assert parsed("--recipe", "best") == no_recipe | train.RECIPES["best"] | {"recipe": "best", "loss_steps": 4}
    assert parsed("--recipe", "best", "--unmask-steps", "3")["loss_steps"] == 1 and parsed("--recipe", "best", "--loss-steps", "7")["loss_steps"] == 7
    changed = parsed("--recipe", "paper", "--transition", "p2", "--kl", "--no-filter-low")
    assert changed == no_recipe | {"recipe": "paper"}


def test_loss_iterations():
    args = lambda **k: type("Args", (), {"unmask_steps": 8, "loss_steps": 3, "seed": 1, **k})  # noqa: E731
    assert train.loss_iterations(0, args(loss_steps_from="first")) == [0, 1, 2]
    assert train.loss_iterations(0, args(loss_steps_from="last")) == [5, 6, 7]
    assert train.loss_iterations(0, args(loss_steps=None, loss_steps_from="first")) == list(range(8))
    draws = [train.loss_iterations(s, args(loss_steps_from="random")) for s in range(400)]
    assert all(len(set(d)) == 3 for d in draws) and len(set(map(tuple, draws))) > 40
    share = torch.bincount(torch.tensor(draws).flatten(), minlength=8) / 400
    assert (share - 3 / 8).abs().max() < 0.09            # every iteration as often: an unbiased estimate


def arguments(**changes):
    """Flags for the parts of train.py."""
    flags = dict(train.PRESETS["shapes"], group_size=4, unmask_steps=4, transition="p2", trajectory="rollout", adv="std", ratio="sum", inner_epochs=1,
                 loss_steps=None, loss_steps_from="first", micro_batch=5, clip_low=0.9, clip_high=1.2, max_grad_norm=0, kl_beta=0.0, temperature=1.0, seed=0)
    return type("Args", (), flags | changes)


def batch_of_rollouts(showo, args, seed=0):
    lines = train.shapes.prompts("train", 4)
    batch = train.empty_batch(lines, showo, args)
    batch.traj = rollout(lambda c: showo.logits(c, batch.prompt), 16, showo.N, showo.K, args.unmask_steps, keep_sampled=True, keep_cut=True,
                         keep_predicted=True, generator=torch.Generator().manual_seed(seed))
    batch.rewards = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed))
    return batch


@pytest.mark.parametrize("transition, which", [("p1", {}), ("p2", {}), ("ar", {}), ("gumbel", {}), ("forward", {}),
                                               ("p2", dict(loss_steps=2)), ("p1", dict(loss_steps=2, loss_steps_from="last"))])
def test_update_is_the_gradient_of_equation_10(base, transition, which):
    """Micro-batches over rows and iterations against Eq. 10 written in one expression."""
    from grpo import clipped_objective, group_advantages
    from sample import transition_log_prob
    showo = load_showo("shapes")
    args = arguments(transition=transition if transition != "forward" else "p1", trajectory="forward" if transition == "forward" else "rollout", **which)
    iterations = range(2, 4) if "loss_steps_from" in which else range(which.get("loss_steps", 4))
    batch = batch_of_rollouts(showo, args)
    if transition == "forward":
        batch.traj, transition = remask(batch.traj.codes, 4, [torch.Generator().manual_seed(0)]), "ar"
    taken = []
    optimizer = torch.optim.SGD(showo.parameters(), lr=0.0)
    optimizer.step = lambda: taken.append(torch.cat([p.grad.flatten() for p in showo.parameters()]))
    train.update(0, batch, args, showo, None, optimizer)
    traj = batch.traj
    noisy = lambda traj, t, kind: dict(cut=traj.cut[:, t, 0], at_cut=torch.arange(showo.N) == traj.cut[:, t, 1:],  # noqa: E731
                                       noise=max(temperatures(4)[t], 0.05)) if kind == "gumbel" else {}
    logp = torch.stack([transition_log_prob(showo.logits(traj.state(t, showo.K), batch.prompt), traj.codes, traj.order, t, transition,
                                            threshold=traj.threshold, sampled=traj.sampled, **noisy(traj, t, transition)) for t in iterations], 1)
    (-clipped_objective(logp, logp.detach(), group_advantages(batch.rewards).flatten())).backward()
    wanted = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in showo.parameters()])
    assert (taken[0] - wanted).norm() < 1e-5 * wanted.norm() and wanted.norm() > 0


@pytest.mark.parametrize("how", ["grad_checkpoint", "bf16"])
def test_cheaper_updates_have_the_same_gradient(base, how):
    args = arguments(kl_beta=0.1)
    taken, layers = [], []
    for cheap in (False, True):
        showo, reference = load_showo("shapes"), load_showo("shapes").requires_grad_(False)
        batch = batch_of_rollouts(showo, args)
        showo.grad_checkpoint, showo.compute_dtype = cheap and how == "grad_checkpoint", torch.bfloat16 if cheap and how == "bf16" else None
        counted = showo.showo.model.layers[0].mlp.fc1.register_forward_hook(lambda *_: layers.append(cheap))  # noqa: B023
        optimizer = torch.optim.SGD(showo.parameters(), lr=0.0)
        optimizer.step = lambda: taken.append(torch.cat([p.grad.flatten() for p in showo.parameters()]))  # noqa: B023
        train.update(0, batch, args, showo, reference, optimizer)
        counted.remove()
    exact, cheaper = taken
    assert (cheaper - exact).norm() < (1e-5 if how == "grad_checkpoint" else 5e-2) * exact.norm() and exact.norm() > 0
    assert how == "bf16" or layers.count(True) > 1.5 * layers.count(False)          # layers did run again


def test_critical_iterations_are_those_that_change_the_prediction_most(base):
    showo, magvit = base
    args = arguments(loss_steps=2, loss_steps_from="critical")
    traj = batch_of_rollouts(showo, args).traj
    traj.predicted = traj.predicted[:1].repeat(4, 1, 1)
    traj.predicted[2:, 0] = (traj.predicted[0, 0] + 7) % showo.K          # another picture from iteration 2 on
    traj.predicted[3, 4, :3] = (traj.predicted[0, 4, :3] + 7) % showo.K
    change = train.picture_change(traj, magvit, 4)
    assert change[0] == change[1] == 0 and change[2] > change[3] > 0
    assert train.loss_iterations(0, args, change) == [2, 3]


def test_only_groups_under_the_bar_are_sampled_again(monkeypatch, base):
    args = arguments(max_resample=2)
    lines = train.shapes.prompts("train", 4)
    stds = iter([[0.0, 1, 1, 0.0], [1, 0.0], [0.0]])        # per attempt, of the groups sampled in it

    def reward(images, prompts, metadata):
        spread = torch.tensor(next(stds))
        assert len(images) == 4 * len(spread)
        reward.log = {}
        return (spread[:, None] * torch.tensor([-1.0, 1, -1, 1])).flatten()

    bar = train.SampleFilter(percentile=50, warmup=1)
    bar.history = [0.5] * 100
    batch = train.collect(0, lines, args, *base, reward, bar, train.Clock(torch.device("cpu")))
    assert batch.resampled == 3 and (batch.rewards.std(1) > 0).tolist() == [True, True, True, False] and next(stds, None) is None
    assert len(bar.history) == 107


@pytest.mark.parametrize("flags, message", [
    (["--group-size", "1"], "--group-size: 1 is out of range"),
    (["--group-size", "x"], "--group-size: 'x' is not a whole number"),
    (["--filter-percentile", "101"], "--filter-percentile: 101 is out of range"),
    (["--steps", "0"], "--steps: 0 is out of range"),
    (["--loss-steps", "5"], "--loss-steps 5 is more than --unmask-steps 4"),
    (["--prompts", "absent.txt"], "--prompts absent.txt: cannot be read"),
    (["--prompts", "EMPTY"], "no prompts in it"),
    (["--trajectory", "forward", "--loss-steps-from", "critical"], "ranks the iterations of a rollout"),
    (["--prompts", "BROKEN"], "line 2 is not JSON"),
    (["--prompts", "NOPROMPT"], 'line 1 has no "prompt"'),
    (["--prompts", "PLAIN"], "GenEval metadata"),
    (["--reward", "beauty"], "'beauty' is not known"),
    (["--out", "OTHER"], "holds another run"),
    (["--resume"], "--resume without a checkpoint needs --out"),
    (["--resume", "absent"], "--resume absent: cannot be used: no such folder"),
    (["--resume", "--out", "EMPTYRUN"], "no checkpoint in"),
    (["--resume", "CHECKPOINT", "--group-size", "8"], "that run has --group-size 4, not 8"),
    (["--resume", "CHECKPOINT", "--model", "other/model"], "that run has --model shapes, not other/model"),
    (["--vq", "nowhere"], "nowhere: no such file or folder")])
def test_bad_input_is_one_line_and_exit_2(monkeypatch, tmp_path, capsys, flags, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n{"prompt"\n')
    (tmp_path / "noprompt.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "plain.txt").write_text("a photo of a red circle\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "emptyrun").mkdir()
    (tmp_path / "run/checkpoint-2").mkdir(parents=True)
    saved = dict(zip(checkpoint.SAME, ("shapes", 4, 4, "p2", "rollout", 1, True, 42)))
    trainer = tmp_path / "run/checkpoint-2/trainer.pt"
    torch.save({"step": 2, "args": saved, "optimizer": {}, "filter": {"history": []}}, trainer)
    checkpoint.write_json(trainer.with_name("manifest.json"), {"trainer.pt": [trainer.stat().st_size, checkpoint.crc32(trainer)]})
    places = {"EMPTY": "empty.txt", "BROKEN": "broken.jsonl", "NOPROMPT": "noprompt.jsonl", "PLAIN": "plain.txt", "OTHER": "other",
              "EMPTYRUN": "emptyrun", "CHECKPOINT": "run/checkpoint-2"}
    flags = [str(tmp_path / places[f]) if f in places else f for f in flags]
    before = sorted((str(f), f.stat().st_mtime_ns) for f in tmp_path.rglob("*"))
    out = [] if "--out" in flags or "--resume" in flags else ["--out", str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *out, *flags])
    with pytest.raises(SystemExit) as stopped:
        run(train.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1 and "Traceback" not in error
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert sorted((str(f), f.stat().st_mtime_ns) for f in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script, flags", [("sample.py", ["--model", "shapes", "--prompt", "a photo of a red circle", "--n", "4", "--steps", "4"]),
                                           ("eval_geneval.py", ["--model", "shapes", "--n", "1", "--steps", "4"])])
def test_the_other_command_lines(tmp_path, script, flags):
    out = tmp_path / ("grid.png" if script == "sample.py" else "eval")
    done = subprocess.run([sys.executable, str(ROOT / script), *flags, "--out", str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if script == "sample.py":
        from PIL import Image
        assert Image.open(out).size == (2 * 132, 2 * 160)
    else:
        rows = checkpoint.read_rows(out / "results.jsonl")
        assert len(rows) == 63 and list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
        assert (out / "00062/samples/0000.png").exists() and "Overall score" in done.stdout
        assert json.loads((out / "summary.json").read_text())["detector"] == "shapes, exact"


def test_the_readme_example_trains_somebody_else_s_model():
    text = (ROOT / "README.md").read_text().split("## Use it with your own masked model")[1]
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    scope = {}
    exec(code, scope)
    assert scope["after"] > scope["before"] + 0.3


def test_the_prompt_files_are_what_their_generator_makes():
    from make_prompts import captions
    texts = captions(5012, 0)
    assert (ROOT / "prompts/train.txt").read_text().splitlines() == texts[:5000]
    assert (ROOT / "prompts/eval.txt").read_text().splitlines() == texts[5000:]
    assert not any(t.lower().startswith("a photo of") for t in texts) and len(set(texts)) == 5012
    words = sorted(len(t.split()) for t in texts)
    assert words[250] <= 8 and words[-250] >= 30
