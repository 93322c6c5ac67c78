"""Odd prompts and damaged files: what can be used works, the rest is one line and exit code 2, never a traceback."""
import io
import json
import random
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import eval_geneval
import reward
import sample
import train

PROMPTS = ["", " ", "\t", "\x00", "\x07\x1b[31mred\x1b[0m", "a\rb", "a red circle " * 5000, "<|soi|><|eoi|>[PAD]<|endoftext|><|t2i|>", "红色的狐狸在雪地里",
           "ثعلب أحمر", "🦊👩‍👩‍👧", "\u202egnirts", "a\u2028b\u0085c", "\ud800", "\\n%s{}", "A" * 60000]


def ends_well(main, command, monkeypatch, capsys):
    """main() with a command line: it works (True), or ends with one line and exit code 2 (False)."""
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    try:
        sample.run(main)
        return True
    except SystemExit as stopped:
        error = capsys.readouterr().err
        assert stopped.code == 2 and error.count("\n") == 1 and "Traceback" not in error and 20 < len(error) < 1000, error
        return False


def damaged(data: bytes, n: int, seed=0):
    """n ways in which a file is not what it was: cut off, empty, bytes exchanged, zeros, noise, another file's beginning."""
    dice = random.Random(seed)
    yield from (b"", data[:1], data[:len(data) // 2], data[:-1], b"\0" * len(data), dice.randbytes(min(len(data), 5000)), b"PK\3\4" + data, b"\x80\4." + data)
    for _ in range(n):
        spoilt = bytearray(data)
        for _ in range(dice.choice([1, 20])):
            spoilt[dice.randrange(min(len(data), dice.choice([16, 300, len(data)])))] = dice.randrange(256)
        yield bytes(spoilt)


def test_odd_prompts(monkeypatch, tmp_path, capsys):
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"prompt": text, "tag": "single", "include": [{"class": "circle", "count": 1}]}) + "\n" for text in PROMPTS))
    assert ends_well(sample.main, ["sample.py", "--model", "shapes", "--steps", 2, "--prompts", tmp_path / "odd.jsonl", "--out", tmp_path / "odd.png"],
                     monkeypatch, capsys)
    assert Image.open(tmp_path / "odd.png").width > 100
    for text in PROMPTS:
        assert ends_well(sample.main, ["sample.py", "--model", "shapes", "--steps", 2, f"--prompt={text}", "--out", tmp_path / "one.png"], monkeypatch, capsys)
    flags = ["--model", "shapes", "--no-kl", "--steps", 1, "--group-size", 2, "--unmask-steps", 2, "--eval-every", 0, "--sample-every", 1, "--save-every", 0]
    assert ends_well(train.main, ["train.py", *flags, "--prompts", tmp_path / "odd.jsonl", "--eval-prompts", tmp_path / "odd.jsonl",
                                  "--prompts-per-step", len(PROMPTS), "--out", tmp_path / "run"], monkeypatch, capsys)
    assert len(checkpoint.read_rows(tmp_path / "run/metrics.jsonl")) == 1


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_damaged_prompt_files(monkeypatch, tmp_path, capsys, kind):
    lines = ["a photo of a red circle", "a photo of two blue squares", "红色的狐狸"]
    data = "".join((text if kind == "txt" else json.dumps({"prompt": text, "tag": "single", "include": []})) + "\n" for text in lines).encode()
    ends = []
    for i, content in enumerate(damaged(data, 20)):
        (tmp_path / f"{i}.{kind}").write_bytes(content)
        ends.append(ends_well(sample.main, ["sample.py", "--model", "shapes", "--steps", 2, "--prompts", tmp_path / f"{i}.{kind}",
                                            "--out", tmp_path / "x.png"], monkeypatch, capsys))
    assert {True, False} == set(ends)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "pth"])
def test_damaged_weights(monkeypatch, tmp_path, capsys, kind):
    whole = ROOT / "shapes/pytorch_model.safetensors"
    if kind != "safetensors":
        torch.save(load_file(whole), tmp_path / "whole")
        whole = tmp_path / "whole"
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "shapes", folder, ignore=lambda *_: ["pytorch_model.safetensors", "magvitv2"])
    where = folder / f"pytorch_model.{kind}" if kind != "pth" else tmp_path / "weights.pth"
    ends = []
    for content in damaged(whole.read_bytes(), 12):
        where.write_bytes(content)
        command = ["sample.py", "--model", "shapes", "--ckpt", folder if kind != "pth" else where, "--prompt", "x", "--steps", 2, "--out", tmp_path / "x.png"]
        ends.append(ends_well(sample.main, command, monkeypatch, capsys))
    assert ends.count(False) >= 8


@pytest.mark.parametrize("name", ["config.json", "phi_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_json(monkeypatch, tmp_path, capsys, name):
    shutil.copytree(ROOT / "shapes", tmp_path / "model")
    for content in [*damaged((ROOT / "shapes" / name).read_bytes(), 12), b"[]", b"null", b"{}", b'{"model_type": 5}']:
        (tmp_path / "model" / name).write_bytes(content)
        ends_well(sample.main, ["sample.py", "--model", tmp_path / "model", "--vq", "shapes/magvitv2", "--prompt", "x", "--steps", 2, "--out", tmp_path / "x.png"],
                  monkeypatch, capsys)


def test_damaged_pictures(monkeypatch, tmp_path, capsys):
    memory = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(memory, "PNG")
    ends = []
    monkeypatch.setattr(reward, "ClipReward", lambda *_: lambda images, prompts, metadata: (torch.zeros(len(images)), {}))
    (tmp_path / "prompts.txt").write_text("a photo of a red circle\n")
    for i, content in enumerate(damaged(memory.getvalue(), 20)):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}/0.png").write_bytes(content)
        ends.append(ends_well(reward.main, ["reward.py", "--reward", "clip", "--images", tmp_path / f"{i}", "--prompts", tmp_path / "prompts.txt"], monkeypatch, capsys))
    assert ends.count(False) >= 8
    ends_well(eval_geneval.main, ["eval_geneval.py", "--model", "shapes", "--n", 1, "--steps", 2, "--out", tmp_path / "geneval"], monkeypatch, capsys)
    for i, content in enumerate(damaged(memory.getvalue(), 8)):
        (tmp_path / f"geneval/{i:05d}/samples/0000.png").write_bytes(content)
    ends_well(eval_geneval.main, ["eval_geneval.py", "--model", "shapes", "--score-only", tmp_path / "geneval"], monkeypatch, capsys)


@pytest.mark.parametrize("name", ["trainer.pt", "manifest.json", "metrics.jsonl", "eval.jsonl", "pytorch_model.safetensors"])
def test_damaged_runs(monkeypatch, tmp_path, capsys, name):
    flags = ["train.py", "--model", "shapes", "--no-kl", "--group-size", 2, "--prompts-per-step", 2, "--unmask-steps", 2, "--eval-every", 1, "--eval-n", 1,
             "--eval-unmask-steps", 1, "--sample-every", 0, "--save-every", 1]
    if not ends_well(train.main, [*flags, "--steps", 1, "--out", tmp_path / "run"], monkeypatch, capsys):
        pytest.fail("the run itself")
    where = tmp_path / "run" / name if name.endswith("jsonl") else tmp_path / "run/checkpoint-1" / name
    whole = where.read_bytes()
    for content in [*damaged(whole, 6), *([b'{"a": 1}\n', b"[1]\n{}\n"] if name.endswith("jsonl") else [])]:
        where.write_bytes(content)
        before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
        if ends_well(train.main, [*flags, "--steps", 1, "--resume", tmp_path / "run/checkpoint-1"], monkeypatch, capsys):
            assert name.endswith("jsonl") or json.loads(content) == json.loads(whole)       # a line cut off at the end; a space exchanged
        else:
            assert all(f.read_bytes() == data for f, data in before.items())
        if name == "trainer.pt":                                # past the manifest, the file itself
            checkpoint.write_json(where.with_name("manifest.json"), {name: [len(content), checkpoint.crc32(where)]})
            ends_well(train.main, [*flags, "--steps", 1, "--resume", tmp_path / "run/checkpoint-1"], monkeypatch, capsys)
