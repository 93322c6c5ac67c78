"""common.py: flags, devices, errors, prompt files, the log, signals, pictures, and what one process
alone does."""
import argparse
import json
import math
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import common

# ------------------------------------------------------------------------------ flags and devices

def test_settings_of_the_sampler_depend_on_the_model(monkeypatch):
    def settings(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
        p = argparse.ArgumentParser()
        common.add_model_flags(p.add_argument)
        common.add_sampling_flags(p)
        args = p.parse_args()
        return {name: getattr(args, name) for name in common.SAMPLING}
    assert settings() == {"T": 50, "guidance": 5.0, "batch": 8, "temperature": 1.0}
    tiny = settings("--model", "shapes")
    assert tiny == {"T": 12, "guidance": 0.0, "batch": 256, "temperature": 1.0}
    given = settings("--steps", "3", "--cfg", "0", "--batch", "2", "--temperature", "0.5")
    assert given == {"T": 3, "guidance": 0, "batch": 2, "temperature": 0.5}


def test_one_process_is_the_first_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert common.setup("cpu") == (0, 1, torch.device("cpu"))
    assert (common.rank(), common.world()) == (0, 1)
    tensor = torch.arange(3)
    assert common.all_sum(tensor) is tensor and common.all_cat(tensor) is tensor
    assert common.all_lists([1, 2]) == [1, 2] and common.barrier() is None


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nonsense"])
def test_a_device_that_is_not_there_is_said(device):
    with pytest.raises(SystemExit, match=f"--device {device}.*: there is none"):
        common.setup(device)


def test_dtypes():
    assert common.choose_dtype("auto", "cpu") == common.choose_dtype("fp32", "cpu") == torch.float32
    assert common.choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    assert common.choose_dtype("auto", "cuda") == torch.bfloat16


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
        common.run(main)
    return stopped.value.code


def test_the_first_process_that_fails_says_a_plain_line(monkeypatch, capsys):
    monkeypatch.setattr(common.os, "_exit", sys.exit)
    monkeypatch.setattr(common, "STORE", Store())
    for said in ("--out x: holds another run\n", ""):       # the second one is silent
        assert ends(SystemExit("--out x: holds another run")) == 1
        assert capsys.readouterr().err == said
    monkeypatch.setattr(common, "STORE", Store())
    assert ends(ValueError("a bug")) == 1                   # a traceback for what is not expected
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.rstrip().endswith("ValueError: a bug")
    for rank, lines in (("0", 1), ("1", 0)):                # before the processes have joined
        monkeypatch.setattr(common, "STORE", None)
        monkeypatch.setenv("RANK", rank)
        assert ends(SystemExit("--steps: not a number")) == 1
        assert capsys.readouterr().err.count("\n") == lines


def test_alone_python_reports_what_is_not_expected(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="a bug"):
        common.run(lambda: int("a bug"))
    monkeypatch.setattr(common.os, "_exit", sys.exit)
    assert ends(torch.OutOfMemoryError("tried to allocate 3 GiB")) == 1
    said = capsys.readouterr().err
    assert "--micro-batch" in said and "--grad-checkpoint" in said and "--lora" in said


# ------------------------------------------------------------------------------ signals

def test_a_second_signal_ends_at_once(monkeypatch):
    clock, ended = SimpleNamespace(now=100.0, monotonic=lambda: clock.now), []
    monkeypatch.setattr(common, "time", clock)
    monkeypatch.setattr(common.os, "_exit", ended.append)
    stop = common.StopSignal()
    assert not stop.number
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM and ended == []
    for clock.now in (100.0, 100.9):                # the same one, passed on by torchrun
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == []
    clock.now = 101.1
    os.kill(os.getpid(), signal.SIGINT)
    assert ended == [128 + signal.SIGINT]


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP is under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = common.StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.number and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ------------------------------------------------------------------------------ prompt files

def test_prompt_files(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\n  two words \n")
    assert common.read_prompts(str(text)) == [{"prompt": "one"}, {"prompt": "two words"}]
    lines.write_text('{"prompt": "a", "reward_prompt": "b", "tag": "x"}\n\n{"prompt": "c"}\n')
    assert common.read_prompts(lines) == [{"prompt": "a", "reward_prompt": "b", "tag": "x"},
                                          {"prompt": "c"}]


def test_prompt_files_of_other_systems(tmp_path):
    """A byte order mark, carriage returns, and what only Python takes for a line's end."""
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("\ufeffein Käfer\r\n\r\ntwo\u2028words\x0b!\r\n\u00a0x \u00a0\n{}".encode())
    assert [entry["prompt"] for entry in common.read_prompts(text)] == [
        "ein Käfer", "two\u2028words\x0b!", "x", "{}"]
    lines.write_bytes('\ufeff{"prompt": "Käfer"}\r\n{"prompt": "b"}'.encode())
    assert [entry["prompt"] for entry in common.read_prompts(lines)] == ["Käfer", "b"]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"prompt": "x"}\nnot json\n', "cannot be read .Expecting value"),
    ("b.jsonl", b'{"prompt": "x"}\n{"short": "x", "long": "y"}',
     "number 2 has no prompt, but short, long; name one: .*b.jsonl:KEY"),
    ("c.csv", b"a cat,1\na dog,2\n", "number 1 has no prompt, but a cat, 1"),
    ("d.json", b'{"a": ["x"]}', "number 1 has no prompt, but a; name one"),
    ("e.json", b'["x", 3]', "number 2 has no prompt, but 3"),
    ("f.jsonl", b'{"prompt": null}', "number 1 has no prompt"),
    ("c.txt", b" \n", "there is no prompt in it"),
    ("d.parquet", b"", "wanted .txt"), ("e.txt", None, "cannot be read")])
def test_bad_prompt_files_are_said(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message) as refused:
        common.read_prompts(tmp_path / name)
    assert str(refused.value).startswith(str(tmp_path / name))


# ------------------------------------------------------------------------------ the log

ROW = {"step": 3, "reward_mean": 0.5, "adv_zero": 0.25, "ratio_mean": 1.0, "ratio_max": 1.0,
       "approx_kl": 0.0, "kl_ref": 0.0, "clip_fraction": 0.0, "grad_norm": 0.125, "entropy": 2.0,
       "lr": 1e-3, "images_per_s": 12.0, "taken": 1}


def log(out, **flags):
    return common.Log(out, SimpleNamespace(**{"steps": 4, "wandb": None, **flags}), 2)


def lines_of(path):
    """Return the rows of a file, which must be JSON to the letter: without NaN."""
    def refuse(name):
        pytest.fail(f"{name} is no JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_the_log_writes_a_row_and_says_a_line(tmp_path, capsys):
    own = log(tmp_path)
    own.step(ROW)
    own.step({**ROW, "step": 4, "grad_norm": math.nan, "reward_mean": -math.inf, "taken": 0})
    own.evaluation({"step": 4, "overall": 0.25, "colors": 1.0})
    nulls = {**ROW, "step": 4, "grad_norm": None, "reward_mean": None, "taken": 0}
    assert lines_of(tmp_path / "metrics.jsonl") == [ROW, nulls]
    assert lines_of(tmp_path / "eval.jsonl") == [{"step": 4, "overall": 0.25, "colors": 1.0}]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("    3/4 | reward 0.500 zero-adv 0.25 ratio 1.000 kl 0.0e+00 clip 0.00 "
                       "grad 0.12 entropy 2.00 lr 1.0e-03 | 12.0 img/s")
    assert said[1].endswith("NOT TAKEN: not finite")
    assert said[2] == "eval step 4 overall 0.25 colors 1"


def test_other_processes_log_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "rank", lambda: 1)
    own = log(tmp_path)
    own.step({**ROW, "taken": 0})
    own.evaluation({"step": 3, "overall": 0.0})
    own.say("hello")
    said = capsys.readouterr()
    assert said.out == said.err == "" and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ pictures

def test_a_grid_enlarges_small_pictures_and_writes_captions_under_them():
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 32, 32) * 40
    sheet = common.grid(images, ["a long caption that needs two lines"] * 6, 3)
    assert sheet.size == (3 * 132, 2 * 160)
    for i in range(6):
        x, y = i % 3 * 132, i // 3 * 160
        picture = sheet.crop((x + 2, y + 2, x + 130, y + 130))
        assert picture.getextrema() == ((40 * i, 40 * i),) * 3
        caption = sheet.crop((x, y + 130, x + 132, y + 160)).convert("L")
        assert caption.getextrema()[0] < 100 and caption.getpixel((131, 29)) == 255
    with pytest.raises(ValueError):
        common.grid(images, ["one caption"], 2)


def test_a_picture_keeps_its_pixels(tmp_path):
    image = torch.randint(256, (3, 4, 5), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    common.to_pil(image).save(tmp_path / "x.png")
    assert torch.equal(common.read_picture(tmp_path / "x.png"), image)


def test_pictures_that_are_there_are_kept(tmp_path):
    files = {i: [tmp_path / f"{i}-{k}.png" for k in range(2)] for i in (3, 5, 8)}
    examples, drawn = [{"prompt": str(i)} for i in range(9)], []

    def draw(prompts, n, seeds):
        drawn.append((prompts, list(seeds)))
        return torch.full((len(prompts) * n, 3, 8, 8), 7, dtype=torch.uint8)
    assert common.draw_missing(files, examples, draw, 4) == 6
    assert drawn == [(["3", "5"], [3, 5]), (["8"], [8])]
    files[5][1].unlink()
    assert common.draw_missing(files, examples, draw, 4) == 2 and drawn[-1] == (["5"], [5])
    assert common.draw_missing(files, examples, draw, 4) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f.name for paths in files.values() for f in paths)


def test_the_first_grid_is_put_above_the_last(tmp_path):
    (tmp_path / "samples").mkdir()
    log = common.Log(tmp_path, SimpleNamespace(steps=2, wandb=None), 0)
    log.close()
    for step, colour in ((0, "red"), (5, "green"), (12, "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"samples/step-{step:06d}.png")
    log.close()
    both = Image.open(tmp_path / "samples/before_after.png")
    assert both.size == (20, 28)
    assert both.getpixel((5, 5)) == (255, 0, 0) and both.getpixel((5, 25)) == (0, 0, 255)
