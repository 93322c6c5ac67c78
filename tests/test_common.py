"""common.py: flags, prompt files, the log, signals, grids, and what one process alone does."""
import errno
import json
import math
import os
import resource
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import checkpoint
import common
from checkpoint import InputError

# ------------------------------------------------------------------------------ flags

def parser():
    p = common.Parser("What it does.")
    p.add_argument("--steps", type=common.in_range(int, 1), default=7, help="how many")
    return p


def test_a_wrong_flag_is_one_line_and_exit_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["some.py"])
    monkeypatch.delenv("RANK", raising=False)
    for flags, message in ((["--steps", "x"], "argument --steps: 'x' is not a whole number"),
                           (["--step", "3"], "unrecognized arguments: --step 3"),
                           (["--nothing"], "unrecognized arguments: --nothing")):
        with pytest.raises(SystemExit) as stopped:
            parser().parse_args(flags)
        said = capsys.readouterr()
        assert stopped.value.code == 2 and said.out == ""
        assert said.err == f"some.py: error: {message} (see --help)\n"


def test_of_several_processes_the_first_one_says_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--steps", "0"])
    assert stopped.value.code == 2 and capsys.readouterr().err == ""


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--help"])
    assert stopped.value.code == 0 and "how many (default: 7)" in capsys.readouterr().out
    assert parser().parse_args([]).steps == 7


@pytest.mark.parametrize("kind, low, high, text, message", [
    (int, 1, math.inf, "0", "0 is out of range, it must be at least 1"),
    (int, 1, 9, "10", "10 is out of range, it must be from 1 to 9"),
    (int, 1, 9, "1.5", "'1.5' is not a whole number"),
    (int, 1, 9, "", "'' is not a whole number"),
    (float, 0, math.inf, "-1e-9", "-1e-9 is out of range, it must be at least 0"),
    (float, 0, math.inf, "inf", "inf is out of range, it must be at least 0"),
    (float, 0, 1, "nan", "nan is out of range, it must be from 0 to 1"),
    (float, 0, 1, "x", "'x' is not a number")])
def test_in_range_refuses(kind, low, high, text, message):
    with pytest.raises(Exception, match=message) as refused:
        common.in_range(kind, low, high)(text)
    assert type(refused.value).__name__ == "ArgumentTypeError" and str(refused.value) == message


def test_in_range_takes_both_bounds():
    parse = common.in_range(int, 1, 9)
    assert parse("1") == 1 and parse("9") == 9
    parse = common.in_range(float, 0, 1)
    assert parse("0") == 0.0 and parse("1") == 1.0 and type(parse("1")) is float
    assert common.in_range(int, 0)("1000000000000") == 10 ** 12


def test_flags_line():
    values = {"no_kl": True, "lr": 3e-6, "out": None, "zero": False, "warmup": 0, "reward": "clip"}
    assert common.flags_line(values) == "--no-kl --lr 3e-06 --warmup 0 --reward clip"
    assert common.flags_line({}) == ""


def test_passwords_leave_addresses():
    for text, shown in (("http://me:secret@host:1/a", "http://host:1/a"),
                        ("0.5*https://me@a/x + http://b:c@d", "0.5*https://a/x + http://d"),
                        ("http://host/a@b", "http://host/a@b"),
                        ("clip", "clip"), ("me@host", "me@host")):
        assert common.without_passwords(text) == shown


def test_settings_of_the_sampler_depend_on_the_model():
    p = common.Parser("")
    common.add_model_flags(p.add_argument)
    common.add_sampling_flags(p.add_argument)
    how = {"temperature": 1.0, "schedule": "cosine", "annealing": "compound"}
    assert common.sampling_settings(p.parse_args([])) == {
        "T": 50, "guidance": 5.0, "batch": 8, **how}
    assert common.sampling_settings(p.parse_args(["--model", "shapes"])) == {
        "T": 12, "guidance": 0.0, "batch": 256, **how}
    given = ["--model", "shapes", "--steps", "3", "--cfg", "1", "--batch", "2",
             "--temperature", "0", "--schedule", "linear", "--annealing", "none"]
    assert common.sampling_settings(p.parse_args(given)) == {
        "T": 3, "guidance": 1.0, "batch": 2, "temperature": 0.0, "schedule": "linear",
        "annealing": "none"}
    assert common.sampling_settings(p.parse_args(["--cfg", "0"]))["guidance"] == 0


# ------------------------------------------------------------------------------ one process

def fails_with(error):
    def main():
        raise error
    return main


def test_one_process_is_the_first_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert common.setup("cpu") == (0, 1, torch.device("cpu"))
    assert (common.get_rank(), common.get_world()) == (0, 1)
    tensor = torch.arange(3)
    assert common.all_sum(tensor) is tensor and common.all_cat(tensor) is tensor
    assert common.all_lists([1, 2]) == [1, 2] and common.barrier() is None


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nonsense", "meta"])
def test_a_device_that_is_not_there_is_said(device):
    with pytest.raises(InputError, match=f"--device {device}.*: cannot be used"):
        common.setup(device)


def test_dtypes():
    assert common.choose_dtype("auto", "cpu") == common.choose_dtype("fp32", "cpu") == torch.float32
    assert common.choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16


def test_on_rank_0_alone(tmp_path):
    def divide(a, b=1):
        return a / b
    assert common.on_rank_0(divide, 6, b=2) == 3
    assert common.on_rank_0([3].count, 4) == 0 and common.on_rank_0([].clear) is None
    with pytest.raises(InputError, match="^--out x: is taken$"):
        common.on_rank_0(fails_with(InputError("--out x: is taken")))
    absent = tmp_path / "absent/file"
    with pytest.raises(InputError, match=f"^{absent}: No such file or directory; "):
        common.on_rank_0(absent.write_text, "x")
    with pytest.raises(ZeroDivisionError):      # what only a traceback explains stays what it is
        common.on_rank_0(divide, 6, b=0)


@pytest.mark.parametrize("error, line", [
    (InputError("--lr: too large"), "--lr: too large"),
    (OSError(errno.ENOSPC, "No space left on device"),
     "a file: No space left on device; make room or choose another"),
    (PermissionError(errno.EACCES, "Permission denied", "/a/b"),
     "/a/b: Permission denied; make room or choose another"),
    (torch.OutOfMemoryError("needs 3 GiB\nand more"),
     "out of memory; a smaller --micro-batch or --batch needs less (needs 3 GiB)"),
    (RuntimeError("gloo: closed"), None),           # of one process that is not a lost network
    (OSError("unplugged"), None), (ValueError("a bug"), None)])
def test_known_faults_are_one_line_and_exit_2(monkeypatch, capsys, error, line):
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])
    monkeypatch.delenv("RANK", raising=False)
    if line is None:
        with pytest.raises(type(error)) as raised:
            common.run(fails_with(error))
        assert raised.value is error and capsys.readouterr().err == ""
        return
    with pytest.raises(SystemExit) as stopped:
        common.run(fails_with(error))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"train.py: error: {line}\n"


class Store:
    """Stands for torchrun's key-value store."""
    n = 0

    def add(self, key, amount):
        self.n += amount
        return self.n


def test_of_several_faults_the_first_is_said(monkeypatch, capsys):
    """By the process that has it; what follows from it on the others is not said."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(common, "leave", sys.exit)
    lost = "error: lost another process, or the network between them (Connection closed by gloo)"
    for rank, error, line in (("1", InputError("no disk"), "train.py: process 1: error: no disk"),
                              ("0", InputError("no disk"), "train.py: error: no disk"),
                              ("0", RuntimeError("Connection closed by gloo"), f"train.py: {lost}"),
                              ("2", dist.DistBackendError("Connection closed by gloo"),
                               f"train.py: process 2: {lost}")):
        monkeypatch.setattr(common, "STORE", Store())
        monkeypatch.setenv("RANK", rank)
        for said in (line + "\n", ""):
            with pytest.raises(SystemExit) as stopped:
                common.run(fails_with(error))
            assert stopped.value.code == 2 and capsys.readouterr().err == said
    monkeypatch.setattr(common, "STORE", Store())
    for said in (True, False):
        with pytest.raises(SystemExit) as stopped:
            common.run(fails_with(ValueError("a bug")))
        assert stopped.value.code == 1
        assert capsys.readouterr().err.endswith("ValueError: a bug\n") == said


# ------------------------------------------------------------------------------ signals

class Clock:
    """Stands for the module time, and goes only when it is told to."""
    now = 100.0

    def monotonic(self):
        return self.now


def test_a_second_signal_ends_at_once(monkeypatch):
    clock, ended = Clock(), []
    monkeypatch.setattr(common, "time", clock)
    monkeypatch.setattr(common.os, "_exit", ended.append)
    stop = common.StopSignal()
    assert stop.asked == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked == 100.0 and ended == []
    for clock.now in (100.0, 100.9, 101.0):         # the same one, passed on by torchrun
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == 100.0 and ended == []
    clock.now = 101.1
    os.kill(os.getpid(), signal.SIGINT)
    assert ended == [128 + signal.SIGINT]


# ------------------------------------------------------------------------------ prompt files

def test_prompt_files(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\n  two words \n")
    assert common.read_prompts(text) == [{"prompt": "one"}, {"prompt": "two words"}]
    assert common.read_prompts(str(text)) == common.read_prompts(text)
    lines.write_text('{"prompt": "a", "reward_prompt": "b", "tag": "x"}\n\n{"prompt": "c"}\n')
    assert common.read_prompts(lines) == [{"prompt": "a", "reward_prompt": "b", "tag": "x"},
                                          {"prompt": "c"}]


def test_prompt_files_of_other_systems(tmp_path):
    """A byte order mark, carriage returns, and what only Python takes for a line's end."""
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("\ufeffein Käfer\r\n\r\ntwo\u2028words\x0b!\r\n{}".encode())
    assert [entry["prompt"] for entry in common.read_prompts(text)] == [
        "ein Käfer", "two\u2028words\x0b!", "{}"]
    lines.write_bytes('\ufeff{"prompt": "Käfer\u2028"}\r\n{"prompt": ""}'.encode())
    assert [entry["prompt"] for entry in common.read_prompts(lines)] == ["Käfer\u2028", ""]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"prompt": "x"}\nnot json\n', "line 2 is not JSON"),
    ("b.jsonl", b'{"text": "x"}', 'line 1 has no "prompt"'),
    ("c.jsonl", b"[1]", 'line 1 has no "prompt"'),
    ("d.jsonl", b'\n{"prompt": 3}', 'line 2 has no "prompt"'),
    ("e.jsonl", b'{"prompt": "a", "reward_prompt": 1}', 'line 1 has a "reward_prompt" that is no'),
    ("f.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}', "line 2 is not JSON"),
    ("g.jsonl", b'{"prompt": ' + b"[" * 100_000, "line 1 is not JSON"),
    ("h.txt", b" \n", "no prompts"), ("i.jsonl", b"", "no prompts"),
    ("j.txt", b"good\n\xff\xfe\x00bad", "line 2 is not UTF-8"),
    ("k.txt", None, "cannot be read"), (".", None, "cannot be read")])
def test_bad_prompt_files_are_said(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        common.read_prompts(tmp_path / name)
    assert str(refused.value).startswith(f"--prompts {tmp_path / name}: ")


# ------------------------------------------------------------------------------ the log

ROW = {"step": 3, "reward_mean": 0.5, "adv_zero": 0.25, "ratio_mean": 1.0, "ratio_max": 1.0,
       "approx_kl": 0.0, "kl_ref": 0.0, "clip_fraction": 0.0, "grad_norm": 0.125, "entropy": 2.0,
       "lr": 1e-3, "images_per_s": 12.0, "skipped": 0, "bad_prompts": []}


def log(out, **flags):
    return common.Log(out, SimpleNamespace(steps=4, wandb=None, **flags), 2)


def lines_of(path):
    """Return the rows of a file, which must be JSON to the letter: without NaN."""
    def refuse(name):
        pytest.fail(f"{name} is no JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_the_log_writes_a_row_and_says_a_line(tmp_path, capsys):
    own = log(tmp_path)
    own.step(ROW)
    own.step({**ROW, "step": 4})
    own.evaluation({"step": 4, "overall": 0.25, "colors": 1.0})
    own.say("")
    assert lines_of(tmp_path / "metrics.jsonl") == [ROW, {**ROW, "step": 4}]
    assert lines_of(tmp_path / "eval.jsonl") == [{"step": 4, "overall": 0.25, "colors": 1.0}]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == ("    3/4 | reward 0.500 zero-adv 0.25 ratio 1.000 kl 0.0e+00 clip 0.00 "
                       "grad 0.12 entropy 2.00 lr 1.0e-03 | 12.0 img/s")
    assert said[2:] == ["eval step 4 overall 0.250 colors 1.000"]


def test_what_is_not_finite_is_null_in_rows_and_a_dash_on_the_screen(tmp_path, capsys):
    row = {**ROW, "grad_norm": math.nan, "entropy": -math.inf, "reward_mean": math.inf}
    log(tmp_path).step(row)
    wanted = {**ROW, "grad_norm": None, "entropy": None, "reward_mean": None}
    assert lines_of(tmp_path / "metrics.jsonl") == [wanted]
    assert " grad - entropy - lr " in capsys.readouterr().out
    assert (common.number(-1.005), common.number(0)) == ("-1.00", "0.00")


def test_alarms(tmp_path, capsys):
    own = log(tmp_path)
    own.step({**ROW, "ratio_max": 10.0, "approx_kl": 0.5, "kl_ref": 10.0})      # not above
    assert "ALARM" not in capsys.readouterr().out
    own.step({**ROW, "approx_kl": math.inf, "kl_ref": 9.0, "ratio_max": 11.0})
    said = capsys.readouterr().out
    assert "ALARM: ratio_max 11 is above 10" in said and "ALARM: approx_kl inf is above 0.5" in said
    assert said.count("ALARM") == 2
    assert checkpoint.read_rows(tmp_path / "metrics.jsonl")[1]["approx_kl"] is None
    own.step({**ROW, "kl_ref": 10.5})
    assert "ALARM: kl_ref 10.5 is above 10; a smaller --lr" in capsys.readouterr().out


def test_a_skipped_step_is_said_with_its_prompts(tmp_path, capsys):
    own = log(tmp_path)
    own.step({**ROW, "skipped": 1, "bad_prompts": ["a star", "a moon"]})
    own.step({**ROW, "skipped": 1})
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "step 3 skipped, something was not finite: a star; a moon"
    assert said[3] == "step 3 skipped, something was not finite: the sum of the gradients"


def test_other_processes_log_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "get_rank", lambda: 1)
    own = log(tmp_path)
    own.step({**ROW, "ratio_max": 99.0, "skipped": 1})
    own.evaluation({"step": 3, "overall": 0.0})
    own.say("hello")
    said = capsys.readouterr()
    assert said.out == said.err == "" and list(tmp_path.iterdir()) == []


def test_a_row_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(InputError, match="gone/metrics.jsonl: cannot be written .*No such file"):
        log(tmp_path / "gone").step(ROW)


def test_weights_and_biases_get_the_same_rows(monkeypatch, tmp_path):
    sent = []

    class Run:
        def log(self, values, step):
            sent.append((values, step))

    def init(**how):
        sent.append(how)
        return Run()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    args = SimpleNamespace(steps=4, wandb="project", seed=1)
    own = common.Log(tmp_path / "run", args, 0)
    (tmp_path / "run").mkdir()
    own.evaluation({"step": 2, "overall": math.nan})
    assert sent == [{"project": "project", "name": "run", "config": vars(args)},
                    ({"eval/step": 2, "eval/overall": None}, 2)]


def test_before_after_table():
    rows = [{"step": 0, "overall": 0.25, "colors": 0.5, "counting": None, "gone": 1.0},
            {"step": 5, "overall": 0.5},
            {"step": 10, "overall": 0.75, "colors": None, "counting": 1.0, "new": 1.0}]
    assert common.before_after_table(rows).splitlines() == [
        "                  before -> after     (steps 0 and 10)",
        "overall            0.250 -> 0.750   "]
    lines = common.before_after_table([rows[0], {**rows[0], "step": 7}]).splitlines()
    assert [line.split()[0] for line in lines] == ["before", "overall", "colors", "gone"]


def test_peak_memory_is_that_of_this_process():
    with open("/proc/self/status") as status:
        high_water = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert common.peak_gib("cpu") == pytest.approx(high_water / 2 ** 20, rel=0.05)
    block = torch.ones(2 ** 25)
    full = common.peak_gib(torch.device("cpu"))
    assert full >= block.nbytes / 2 ** 30
    del block
    assert common.peak_gib("cpu") >= full       # the most, not what it holds now
    assert full <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


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


def test_a_grid_without_captions_has_no_room_for_them():
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    assert common.grid(images, [""] * 3, 2).size == (2 * 132, 2 * 132)
    assert common.grid(images, ["", "", "x"], 2).size == (2 * 132, 2 * 160)
    wide = torch.zeros(1, 3, 200, 300, dtype=torch.uint8)
    assert common.grid(wide, [""], 1).size == (304, 204)        # as it is
    with pytest.raises(ValueError):
        common.grid(images, ["one caption"], 2)


def test_a_picture_keeps_its_pixels():
    image = torch.randint(256, (3, 4, 5), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    pixels = common.to_pil(image)
    assert pixels.size == (5, 4) and pixels.getpixel((3, 1)) == tuple(image[:, 1, 3].tolist())


def test_the_first_grid_is_put_above_the_last(tmp_path):
    for step, colour in ((0, "red"), (5, "green"), (12, "blue")):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"step-{step:06d}.png")
    common.before_and_after(tmp_path)
    both = Image.open(tmp_path / "before_after.png")
    assert both.size == (20, 28)
    assert both.getpixel((5, 5)) == (255, 0, 0) and both.getpixel((5, 25)) == (0, 0, 255)
