"""eval_geneval.py: folders drawn and scored, by several processes too, and the summary."""
import json
import random
import subprocess
import sys
from unittest import mock

import pytest
import torch
from helpers import DATA, ROOT, read_lines
from PIL import Image

import eval_geneval
from shapes import world
from shapes.pretrain import render
from support import geneval, pictures, processes

EXAMPLES = world.prompts("eval")[::9]


def truth(prompts, n, seeds):
    """Draw each prompt's picture as it should be."""
    by_text = {example["prompt"]: example for example in EXAMPLES}
    drawn = []
    for text, seed in zip(prompts, seeds, strict=True):
        for k in range(n):
            picture, _ = render(by_text[text], random.Random(seed * 10 + k))
            drawn.append(picture)
    return torch.stack(drawn)


def draw(out, batch=64, rank=0, world=1):
    with mock.patch.multiple(processes, rank=lambda: rank, world=lambda: world):
        files = eval_geneval.folders_of(out, EXAMPLES, 2)
    return pictures.draw_missing(files, EXAMPLES, truth, batch)


def test_drawing_is_shared_out_and_goes_on(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    parts = [draw(two, batch=3, rank=rank, world=2) for rank in (0, 1)]
    assert draw(one) == sum(parts) == 2 * len(EXAMPLES)
    files = sorted(f.relative_to(one) for f in one.rglob("*") if f.is_file())
    assert len(files) == 3 * len(EXAMPLES) and str(files[1]) == "00000/samples/0000.png"
    (two / "00005/samples/0000.png").unlink()
    assert draw(two) == 2 and draw(two) == 0
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_scoring_a_folder(tmp_path, capsys):
    draw(tmp_path)
    Image.new("RGB", (48, 48)).save(tmp_path / "00002/samples/0001.png")
    folders = eval_geneval.folders_in(tmp_path)
    assert len(folders) == len(EXAMPLES)
    rows = [row for folder in folders for row in eval_geneval.score_folder(folder, world.detect)]
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata",
                             "details"]
    assert [row["correct"] for row in rows] == [i != 5 for i in range(2 * len(EXAMPLES))]

    eval_geneval.report(tmp_path, rows, {"detector": "x"})
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert numbers["detector"] == "x" and numbers["images"] == 2 * len(EXAMPLES)
    tags = [example["tag"] for example in EXAMPLES]
    share_wrong = 0.5 / tags.count(EXAMPLES[2]["tag"])
    assert numbers["overall"] == pytest.approx(1 - share_wrong / len(set(tags)), abs=1e-5)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)
    assert "Overall score" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="40"):       # the world has 48
        world.detect(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["full", "one_per_prompt", "three_tags"])
def test_summary(name):
    rows = read_lines(f"geneval/summary/{name}_results.jsonl")
    expected = (DATA / f"geneval/summary/{name}_summary.txt").read_text()
    assert geneval.summary(rows) == expected


def test_intervals_are_those_of_the_prompts():
    """Prompts all right or all wrong: intervals of a binomial over prompts, not over pictures."""
    rows = [{"tag": tag, "metadata": f"{tag}{i}", "correct": i % 2 == 0}
            for tag in ("a", "b") for i in range(100) for _ in range(4)]
    out = geneval.shares((row["tag"], row["metadata"], row["correct"]) for row in rows)
    assert out["a"][0] == out["overall"][0] == 0.5
    errors = [out[name][1] for name in ("a", "overall")]
    assert errors == pytest.approx([0.05, 0.05 / 2 ** 0.5], rel=0.02)


def test_shares_leave_out_what_has_no_score():
    rows = [("a", 0, 1.0), ("a", 0, float("nan")), ("a", 1, 0.0), ("b", 2, float("nan")),
            ("c", 3, 0.25)]
    out = geneval.shares(rows)
    assert out["a"] == pytest.approx((0.5, 0.5 / 2 ** 0.5))
    assert out["c"][0] == 0.25 and out["b"][0] != out["b"][0]
    assert out["overall"][0] == 0.375


def test_eval_geneval_is_a_command(tmp_path):
    """Started from another folder."""
    done = subprocess.run([sys.executable, ROOT / "eval_geneval.py", "--model", "shapes", "--n",
                           "1", "--steps", "1", "--out", "eval"], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_lines(tmp_path / "eval/results.jsonl")
    assert len(rows) == 63 and "Overall score" in done.stdout
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata",
                             "details"]
    assert (tmp_path / "eval/00062/samples/0000.png").exists()
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert summary["detector"] == "shapes, exact"
