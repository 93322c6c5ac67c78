"""The workflow of a GPU user at tiny size: a Show-o in the hub's layout (not shapes), an open_clip
reward, GenEval's detector; train, evaluate, save, resume, draw, score. One process."""
import contextlib
import json
import shutil
import sys

import open_clip
import pytest
import torch
from conftest import DATA, metrics, read_json, save_tiny_mask2former

import common
import eval_geneval
import reward
import sample
import train
from checkpoint import checkpoints, read_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """See hub()."""
    with hub(tmp_path_factory.mktemp("hub")) as root:
        yield root


@contextlib.contextmanager
def hub(root):
    """Give folders of a tiny Show-o with its tokenizer, MAGVIT-v2, Mask2Former and open_clip
    weights, which rewards and GenEval then take as their own."""
    for source in ("showo/checkpoint", "prompting/tokenizer"):
        shutil.copytree(DATA / source, root / "showo", dirs_exist_ok=True)
    clip = read_json("clip_tiny/config.json")["open_clip"]
    clip["text_cfg"]["vocab_size"] = 49408
    (root / "rehearsed.json").write_text(json.dumps(clip))
    open_clip.add_model_config(root / "rehearsed.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("rehearsed").state_dict(), root / "clip.pt")
    save_tiny_mask2former(root / "detector")
    eval_prompts = eval_geneval.geneval_prompts()[::180]
    lines = [json.dumps(example) + "\n" for example in eval_prompts]
    (root / "eval.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_geneval, "COLOUR_CLIP", f"rehearsed/{root / 'clip.pt'}")
        patch.setattr(eval_geneval, "THRESHOLD", 0.05)
        patch.setattr(reward, "DETECTOR", str(root / "detector"))
        patch.setattr(reward, "CLIP_DEFAULT", f"rehearsed/{root / 'clip.pt'}")
        patch.setattr(reward, "HPS_ARCHITECTURE", "rehearsed")
        yield root


def run(monkeypatch, main, *command):
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    main()


def flags(world, out):
    return ("train.py", "--model", world / "showo", "--vq", DATA / "magvit", "--filter-low",
            "--steps", 2, "--group-size", 2, "--prompts-per-step", 2, "--unmask-steps", 3,
            "--eval-unmask-steps", 2, "--save-every", 1, "--sample-every", 2, "--out", out)


@pytest.mark.parametrize("spec, more", [
    ("clip", ["--no-kl"]), ("clip", ["--kl"]), ("hpsv2:HPS", ["--no-kl", "--lora", 2]),
    ("geneval:partial", ["--no-kl"]), ("clip:1,geneval:1", ["--kl"])])
def test_every_reward_trains_a_show_o(world, monkeypatch, tmp_path, spec, more):
    spec = spec.replace("HPS", str(world / "clip.pt"))
    if "geneval" in spec:
        run(monkeypatch, eval_geneval.main, "eval_geneval.py", "--write-prompts",
            tmp_path / "train.jsonl", "--n", 20)
        more = [*more, "--prompts", tmp_path / "train.jsonl", "--eval-prompts",
                world / "eval.jsonl", "--eval-every", 1, "--eval-reward", "clip", "--best", "clip"]
    out = tmp_path / "run"
    run(monkeypatch, train.main, *flags(world, out), "--reward", spec, *more)
    rows = metrics(out)
    assert len(rows) == 2 and rows[0]["ratio_mean"] == 1 and rows[0]["skipped"] == 0
    assert [f.name for f in checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
    assert (out / "samples/before_after.png").exists()
    if "geneval" in spec:
        assert {"overall", "exact", "clip"} <= read_rows(out / "eval.jsonl")[0].keys()

    shutil.rmtree(out / "checkpoint-2")
    run(monkeypatch, train.main, *flags(world, out), "--reward", spec, *more, "--resume")
    assert metrics(out) == rows


def test_geneval_stops_at_the_start_without_metadata(world, monkeypatch, tmp_path):
    with pytest.raises(common.InputError, match="--prompts .*: prompt 1 lacks GenEval metadata"):
        run(monkeypatch, train.main, *flags(world, tmp_path / "run"), "--reward", "geneval")
    assert not (tmp_path / "run").exists()


def test_tables(world, monkeypatch, tmp_path, capsys):
    """Table 1 by eval_geneval.py; Table 4 by a folder of pictures and reward.py."""
    model = ("--model", world / "showo", "--vq", DATA / "magvit", "--steps", 2)
    run(monkeypatch, eval_geneval.main, "eval_geneval.py", *model, "--n", 2, "--prompts",
        world / "eval.jsonl", "--detector", world / "detector", "--out", tmp_path / "geneval")
    numbers = json.loads((tmp_path / "geneval/summary.json").read_text())
    assert numbers["images"] == 2 * len((world / "eval.jsonl").read_text().splitlines())

    run(monkeypatch, sample.main, "sample.py", *model, "--n", 2, "--prompts", world / "eval.jsonl",
        "--out", tmp_path / "pictures")
    capsys.readouterr()
    spec = f"clip,hpsv2:{world / 'clip.pt'},geneval"
    run(monkeypatch, reward.main, "reward.py", "--reward", spec, "--images",
        tmp_path / "pictures", "--prompts", world / "eval.jsonl", "--detector", world / "detector")
    said = capsys.readouterr().out
    assert [line.split()[0].split(":")[0] for line in said.splitlines()[1:]] == [
        "clip", "hpsv2", "geneval", "objects", "objects_asked", "sum"]
