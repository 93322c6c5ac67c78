"""Hostile input: what can be used works; the rest ends in one line and exit code 2, without a
traceback, and leaves what is saved as it was. Every case says which of the two it expects.

In the tables, None stands for a command that works, a text for a part of its line of error."""
import functools
import io
import json
import random
import shutil
import signal
import struct
import sys
import zlib

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import checkpoint
import common
import eval_geneval
import reward
import sample
import shapes
import train

DEEP = b"[" * 100_000
LONG_NAME = "n" * 300
TRAIN = ("--model shapes --no-kl --steps 1 --prompts-per-step 1 --group-size 2 --unmask-steps 1 "
         "--eval-every 0 --sample-every 0 --save-every 0").split()


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A working folder of its own, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that runs main() under a command line: None when it works, else its one line."""
    return functools.partial(run_main, monkeypatch, capsys)


def run_main(monkeypatch, capsys, main, *flags):
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, flags)])
    sys.stderr.reconfigure(errors="backslashreplace")       # as Python's own is
    capsys.readouterr()
    try:
        common.run(main)
    except SystemExit as stopped:
        said = capsys.readouterr().err
        assert stopped.code == 2, stopped.code
        assert said.count("\n") == 1 and said.endswith("\n"), said
        assert "Traceback" not in said and len(said) < 1500, said
        return said
    return None


def check(said, expected):
    """Assert that a command ended as expected: None = it worked, else a part of its error."""
    if expected is None:
        assert said is None, said
    else:
        assert said is not None and expected in said, said


def snapshot(folder):
    """Return the content of every file of a folder but the lock, and every folder's name."""
    return {path: path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*") if path.name != "lock.json"}


def cases(table):
    """Return pytest parameters of {name: (values, ...)}."""
    return [pytest.param(*values, id=name) for name, values in table.items()]


# ------------------------------------------------------------------------------ prompts

PROMPTS = {
    "empty": "",
    "space": " ",
    "tab": "\t",
    "nul": "\x00",
    "escape sequence": "\x07\x1b[31mred\x1b[0m",
    "carriage return": "a\rb",
    "newlines": "a\n\nb\n",
    "separators": "a\u2028b\u0085c\x0b\x0c",
    "special tokens": "<|soi|><|eoi|>[PAD]<|endoftext|><|t2i|>",
    "Chinese": "红色的狐狸在雪地里",
    "Arabic": "ثعلب أحمر",
    "right to left": "\u202egnirts",
    "zero width": "a\u200b\u200d\ufeffb",
    "emoji": "🦊👩‍👩‍👧",
    "combining": "e" + "\u0301" * 500,
    "lone surrogate": "\ud800",
    "low surrogate first": "\udc00\ud800 x",
    "format marks": "\\n%s{}{0}%(x)d",
    "60,000 letters": "A" * 60_000,
    "60,000 characters in words": "a red circle " * 4_600,
    "beyond the BMP": "\U0010ffff\U000f0000"}


@pytest.mark.parametrize("text", PROMPTS.values(), ids=PROMPTS)
def test_an_odd_prompt_is_drawn_with_its_caption(call, text):
    check(call(sample.main, "--model", "shapes", "--steps", 1, "--n", 2, f"--prompt={text}",
               "--out", "x.png"), None)
    assert Image.open("x.png").width > 250


def example(**changes):
    """Return a line of a prompt file, as a dict."""
    line = {"prompt": "a photo of a red circle", "tag": "colors",
            "include": [{"class": "circle", "count": 1, "color": "red"}]}
    return line | changes


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_odd_prompts_train_and_are_evaluated(call, tmp_path):
    lines = [example(prompt=text, reward_prompt=text) for text in PROMPTS.values()]
    path = write_lines(tmp_path / "odd.jsonl", lines)
    flags = ("--prompts", path, "--prompts-per-step", len(PROMPTS), "--eval-prompts", path,
             "--eval-every", 1, "--eval-n", 1, "--eval-unmask-steps", 1, "--sample-every", 1)
    check(call(train.main, *TRAIN, *flags, "--out", "run"), None)
    assert len(checkpoint.read_rows(tmp_path / "run/metrics.jsonl")) == 1
    assert len(checkpoint.read_rows(tmp_path / "run/eval.jsonl")) == 2
    assert (tmp_path / "run/samples/step-000001.png").exists()


def test_odd_prompts_that_are_skipped_are_printed(call, tmp_path, monkeypatch):
    """The log names the prompts of a skipped step, whatever is in them."""
    path = write_lines(tmp_path / "odd.jsonl", [example(prompt=p) for p in PROMPTS.values()])

    def detect(images, examples):
        raise checkpoint.InputError("no scores to-day")
    monkeypatch.setattr(shapes, "detect", detect)
    check(call(train.main, *TRAIN, "--prompts", path, "--prompts-per-step", len(PROMPTS), "--out",
               "run"), "no scores to-day; saved:")
    row, = checkpoint.read_rows(tmp_path / "run/metrics.jsonl")
    assert row["skipped"] == 1 and len(row["bad_prompts"]) == len(PROMPTS)


# ------------------------------------------------------------------------------ prompt files

LINE = b'{"prompt": "a photo of a star"}\n'
PROMPT_FILES = {
    "txt": ("p.txt", b"a star\ntwo moons\n", None),
    "txt without a newline": ("p.txt", b"a star", None),
    "txt of Windows": ("p.txt", b"a star\r\ntwo moons\r\n", None),
    "txt with a BOM": ("p.txt", b"\xef\xbb\xbfa star\n", None),
    "txt of NULs": ("p.txt", b"\0" * 100, None),
    "txt of a long line": ("p.txt", b"a star " * 50_000, None),
    "txt empty": ("p.txt", b"", "p.txt: no prompts in it"),
    "txt of blanks": ("p.txt", b"\n \t\r\n\n", "p.txt: no prompts in it"),
    "txt of a BOM": ("p.txt", b"\xef\xbb\xbf", "p.txt: no prompts in it"),
    "txt in Latin 1": ("p.txt", b"a star\ncaf\xe9\n", "p.txt: line 2 is not UTF-8"),
    "txt in UTF-16": ("p.txt", "a star".encode("utf-16"), "p.txt: line 1 is not UTF-8"),
    "txt of noise": ("p.txt", b"\x80\x02\xfe", "p.txt: line 1 is not UTF-8"),
    "txt cut in a letter": ("p.txt", "a star 红".encode()[:-1], "p.txt: line 1 is not UTF-8"),
    "surrogates as UTF-8": ("p.txt", b"\xed\xa0\x80\n", "p.txt: line 1 is not UTF-8"),
    "jsonl": ("p.jsonl", LINE * 2, None),
    "jsonl with blank lines": ("p.jsonl", b"\n\n" + LINE + b" \r\n\n", None),
    "jsonl with a BOM": ("p.jsonl", b"\xef\xbb\xbf" + LINE, None),
    "jsonl, two keys": ("p.jsonl", b'{"prompt": 5, "prompt": "a star"}', None),
    "jsonl, a surrogate": ("p.jsonl", rb'{"prompt": "\ud83d"}', None),
    "jsonl, NaN beside": ("p.jsonl", b'{"prompt": "a", "x": [NaN, 1e999, -Infinity]}', None),
    "jsonl, much beside": ("p.jsonl", b'{"prompt": "a", "x": ' + b"[" * 90 + b"]" * 90 + b"}",
                           None),
    "jsonl empty": ("p.jsonl", b"", "p.jsonl: no prompts in it"),
    "jsonl cut": ("p.jsonl", LINE + LINE[:12], "p.jsonl: line 2 is not JSON"),
    "jsonl, two in a line": ("p.jsonl", LINE.strip() * 2, "p.jsonl: line 1 is not JSON"),
    "jsonl of text": ("p.jsonl", b"a photo of a star\n", "p.jsonl: line 1 is not JSON"),
    "jsonl in UTF-16": ("p.jsonl", LINE.decode().encode("utf-16"), "line 1 is not JSON"),
    "jsonl in Latin 1": ("p.jsonl", b'{"prompt": "caf\xe9"}', "line 1 is not JSON"),
    "jsonl deep": ("p.jsonl", LINE + DEEP, "p.jsonl: line 2 is not JSON"),
    "jsonl deep objects": ("p.jsonl", b'{"prompt":' * 100_000, "p.jsonl: line 1 is not JSON"),
    "jsonl, 5,000 digits": ("p.jsonl", b'{"prompt": ' + b"9" * 5_000 + b"}", "line 1 is not JSON"),
    "jsonl of NULs": ("p.jsonl", b"\0" * 100, "p.jsonl: line 1 is not JSON"),
    "jsonl of a list": ("p.jsonl", b'[{"prompt": "a"}]\n', 'line 1 has no "prompt" text'),
    "jsonl of a string": ("p.jsonl", b'"prompt"\n', 'line 1 has no "prompt" text'),
    "jsonl of null": ("p.jsonl", b"null\n", 'line 1 has no "prompt" text'),
    "jsonl of an empty object": ("p.jsonl", b"{}\n", 'line 1 has no "prompt" text'),
    "prompt of 1e400": ("p.jsonl", b'{"prompt": 1e400}', 'line 1 has no "prompt" text'),
    "prompt null": ("p.jsonl", LINE + b'{"prompt": null}', 'line 2 has no "prompt" text'),
    "prompt of a list": ("p.jsonl", b'{"prompt": ["a"]}', 'line 1 has no "prompt" text'),
    "prompt misspelt": ("p.jsonl", b'{"Prompt": "a"}', 'line 1 has no "prompt" text'),
    "reward_prompt 5": ("p.jsonl", b'{"prompt": "a", "reward_prompt": 5}', 'a "reward_prompt"'),
    "reward_prompt null": ("p.jsonl", b'{"prompt": "a", "reward_prompt": null}',
                           'a "reward_prompt"')}


@pytest.mark.parametrize("name, data, expected", cases(PROMPT_FILES))
def test_prompt_files(call, tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    check(call(sample.main, "--model", "shapes", "--steps", 1, "--prompts", name, "--out",
               "x.png"), expected)
    assert (tmp_path / "x.png").exists() == (expected is None)


@pytest.mark.parametrize("name, expected", [
    ("absent.txt", "--prompts absent.txt: cannot be read"),
    ("folder", "--prompts folder: cannot be read"),
    ("folder.jsonl", "--prompts folder.jsonl: cannot be read"),
    ("/dev/null", "--prompts /dev/null: no prompts in it"),
    ("p.txt/p.txt", "cannot be read"),
    (LONG_NAME, "cannot be read"),
    ("loop.txt", "--prompts loop.txt: cannot be read"),
    ("two\nlines.txt", "cannot be read")])
def test_prompt_files_that_are_none(call, tmp_path, name, expected):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "p.txt").write_text("a star\n")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    before = snapshot(tmp_path)
    check(call(train.main, *TRAIN, "--prompts", name, "--out", "run"), expected)
    check(call(sample.main, "--model", "shapes", "--prompts", name), expected)
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------ metadata

def circle(**changes):
    """Return a line whose one clause asks for a circle, with changes."""
    return example(include=[{"class": "circle", "count": 1} | changes])


def positioned(position):
    """Return a line of two clauses, the second one with a position."""
    return example(include=[{"class": "star", "count": 1},
                            {"class": "moon", "count": 1, "position": position}])


LACKS = "p.jsonl: prompt 2 lacks GenEval metadata"
METADATA = {
    "whole": (example(), None),
    "relation": (positioned(["left of", 0]), None),
    "more keys": (example(other=[{}], exclude=[]), None),
    "40 clauses": (example(include=[{"class": "star", "count": 1}] * 40), None),
    "colour null": (circle(color=None), None),
    "unknown class": (circle(**{"class": "unicorn"}), "does not know unicorn"),
    "class in two lines": (circle(**{"class": "uni\ncorn"}), "does not know uni"),
    "COCO's class": (circle(**{"class": "traffic light"}), "does not know traffic light"),
    "unknown class excluded": (example(exclude=[{"class": "yeti", "count": 1}]),
                               "does not know yeti"),
    "unknown colour": (circle(color="mauve"), "does not know mauve"),
    "colour of a list": (circle(color=["red"]), "does not know ['red']"),
    "colour 5": (circle(color=5), "does not know 5"),
    "unknown relation": (positioned(["inside", 0]), "does not know inside"),
    "several unknown": (circle(**{"class": "yeti", "color": "mauve"}), "know yeti, mauve"),
    "tag step": (example(tag="step"), "line 2 has the tag 'step'"),
    "tag overall": (example(tag="overall"), "line 2 has the tag 'overall'"),
    "tag exact": (example(tag="exact"), "line 2 has the tag 'exact'"),
    "tag objects": (example(tag="objects"), "line 2 has the tag 'objects'"),
    "tag objects_asked": (example(tag="objects_asked"), "line 2 has the tag 'objects_asked'"),
    "tag 5": (example(tag=5), "line 2 has the tag 5"),
    "tag null": (example(tag=None), "line 2 has the tag None"),
    "tag of a list": (example(tag=["colors"]), "line 2 has the tag ['colors']"),
    "no tag": ({"prompt": "a", "include": [{"class": "star", "count": 1}]}, LACKS),
    "no include": ({"prompt": "a", "tag": "colors"}, LACKS),
    "include empty": (example(include=[]), LACKS),
    "include null": (example(include=None), LACKS),
    "include 5": (example(include=5), LACKS),
    "include of text": (example(include="circle"), LACKS),
    "include an object": (example(include={"class": "circle", "count": 1}), LACKS),
    "include an empty object": (example(include={}), LACKS),
    "include of numbers": (example(include=[5]), LACKS),
    "include of lists": (example(include=[["class", "count"]]), LACKS),
    "include of null": (example(include=[None]), LACKS),
    "class 5": (circle(**{"class": 5}), LACKS),
    "class of a list": (circle(**{"class": ["circle"]}), LACKS),
    "no class": (example(include=[{"count": 1}]), LACKS),
    "no count": (example(include=[{"class": "circle"}]), LACKS),
    "count 0": (circle(count=0), LACKS),
    "count -1": (circle(count=-1), LACKS),
    "count true": (circle(count=True), LACKS),
    "count 1.5": (circle(count=1.5), LACKS),
    "count text": (circle(count="1"), LACKS),
    "count null": (circle(count=None), LACKS),
    "count of 401 digits": (circle(count=10 ** 400), LACKS),
    "exclude null": (example(exclude=None), LACKS),
    "exclude 5": (example(exclude=5), LACKS),
    "exclude of text": (example(exclude="circle"), LACKS),
    "exclude count 0": (example(exclude=[{"class": "circle", "count": 0}]), LACKS),
    "position, relation a list": (positioned([["left of"], 0]), LACKS),
    "position, relation null": (positioned([None, 0]), LACKS),
    "position of itself": (positioned(["left of", 1]), LACKS),
    "position of what follows": (positioned(["left of", 7]), LACKS),
    "position -1": (positioned(["left of", -1]), LACKS),
    "position 0.0": (positioned(["left of", 0.0]), LACKS),
    "position false": (positioned(["left of", False]), LACKS),
    "position text": (positioned(["left of", "0"]), LACKS),
    "position null": (positioned(None), LACKS),
    "position short": (positioned(["left of"]), LACKS),
    "position long": (positioned(["left of", 0, 0]), LACKS),
    "position an object": (positioned({"left of": 0, "above": 0}), LACKS)}


@pytest.mark.parametrize("line, expected", cases(METADATA))
def test_metadata(call, tmp_path, line, expected):
    path = write_lines(tmp_path / "p.jsonl", [example(), line])
    flags = ("--prompts", path, "--prompts-per-step", 4, "--out", tmp_path / "run")
    check(call(train.main, *TRAIN, *flags), expected)
    if expected:
        assert not (tmp_path / "run").exists()

    # evaluation takes the same lines: a tag "overall" would replace the mean in summary.json
    flags = ("--prompts", path, "--n", 1, "--steps", 1, "--out", tmp_path / "geneval")
    check(call(eval_geneval.main, "--model", "shapes", *flags), expected)
    assert (tmp_path / "geneval").exists() == (expected is None)


# ------------------------------------------------------------------------------ weights

class Bomb:
    """A pickled object that writes a file when it is loaded."""

    def __reduce__(self):
        return exec, ("open('bomb', 'w').close()",)


@functools.cache
def base_weights():
    return load_file(ROOT / "shapes/pytorch_model.safetensors")


def weights_as(kind, state) -> bytes:
    """Return a weight file's bytes: safetensors, or torch.save's of any object."""
    file = io.BytesIO()
    if kind == "safetensors":
        save_file(state, "made.safetensors")
        with open("made.safetensors", "rb") as made:
            return made.read()
    torch.save(state, file)
    return file.getvalue()


def cut(data):
    return data[:len(data) // 2]


def last_byte_gone(data):
    return data[:-1]


def zeros(data):
    return b"\0" * len(data)


def noise(data):
    return random.Random(0).randbytes(5_000)


def empty(data):
    return b""


def one_byte(data):
    return data[:1]


def huge_header(data):
    return b"\xff" * 7 + b"\x7f" + data[8:]


def zip_start(data):
    return b"PK\3\4" + data


def pickle_start(data):
    return b"\x80\4." + data


DAMAGES = (empty, one_byte, cut, last_byte_gone, zeros, noise, huge_header, zip_start,
           pickle_start)


def draw_with(call, *flags):
    """Draw a picture with the tiny base and more flags."""
    return call(sample.main, "--model", "shapes", "--prompt", "a star", "--steps", 1, "--out",
                "x.png", *flags)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "pth"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(call, tmp_path, kind, damage):
    data = damage(weights_as(kind, base_weights()))
    (tmp_path / f"w.{kind}").write_bytes(data)
    check(draw_with(call, "--ckpt", f"w.{kind}"), f"w.{kind}: cannot be read as a weights file")


def without_one(state):
    return {name: weight for name, weight in state.items() if "final_layernorm" not in name}


def with_one_more(state):
    return state | {"showo.extra": torch.zeros(1)}


def transposed(state):
    name = "showo.model.layers.0.mlp.fc1.weight"
    return state | {name: state[name].T.contiguous()}


def scalars(state):
    return {name: weight.flatten()[0].clone() for name, weight in state.items()}


def cast(dtype, state):
    return {name: weight.to(dtype) for name, weight in state.items()}


def inf_bias(state):
    name = "showo.lm_head.bias"
    return state | {name: torch.full_like(state[name], torch.inf)}


def one_nan(state):
    weight = state["showo.model.layers.0.mlp.fc1.weight"].clone()
    weight[0, 0] = torch.nan
    return state | {"showo.model.layers.0.mlp.fc1.weight": weight}


def no_weights(state):
    return {}


def other_names(state):
    return {f"model.{name}": weight for name, weight in state.items()}


as_half = functools.partial(cast, torch.float16)
as_double = functools.partial(cast, torch.float64)
as_int64 = functools.partial(cast, torch.int64)
as_bool = functools.partial(cast, torch.bool)
STATES = {
    "half": (as_half, None),
    "double": (as_double, None),
    "int64": (as_int64, "is torch.int64, wanted torch.float32"),
    "bool": (as_bool, "is torch.bool, wanted torch.float32"),
    "one missing": (without_one, "missing showo.model.final_layernorm"),
    "one more": (with_one_more, "surplus showo.extra"),
    "transposed": (transposed, "has shape [128, 512], wanted [512, 128]"),
    "scalars": (scalars, "w.KIND: "),
    "other names": (other_names, "w.KIND: "),
    "no weights": (no_weights, "w.KIND: "),
    "an inf": (inf_bias, "logits are not finite"),
    "a nan": (one_nan, "logits are not finite")}


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("change, expected", cases(STATES))
def test_weights_that_do_not_fit(call, tmp_path, kind, change, expected):
    (tmp_path / f"w.{kind}").write_bytes(weights_as(kind, change(base_weights())))
    check(draw_with(call, "--ckpt", f"w.{kind}"), expected and expected.replace("KIND", kind))


NO_STATE = "w.pth: not a state_dict"
UNREADABLE = "w.pth: cannot be read as a weights file"
PICKLES = {
    "code": (Bomb(), UNREADABLE),
    "code beside weights": ({"x": torch.zeros(1), "y": Bomb()}, UNREADABLE),
    "a model": (torch.nn.Linear(1, 1), UNREADABLE),
    "a list": ([torch.zeros(1)], NO_STATE),
    "a tensor": (torch.zeros(1), NO_STATE),
    "a number": (5, NO_STATE),
    "null": (None, NO_STATE),
    "text for weights": ({"x": "y"}, NO_STATE),
    "numbers for names": ({5: torch.zeros(1)}, NO_STATE),
    "nested": ({"model": {"x": torch.zeros(1)}}, NO_STATE),
    "state_dict of a list": ({"state_dict": [5]}, NO_STATE),
    "sparse": ({"x": torch.zeros(3, 3).to_sparse()}, NO_STATE),
    "meta": ({"x": torch.zeros(3, device="meta")}, NO_STATE)}


@pytest.mark.parametrize("content, expected", cases(PICKLES))
def test_pickles(call, tmp_path, content, expected):
    torch.save(content, tmp_path / "w.pth")
    check(draw_with(call, "--ckpt", "w.pth"), expected)
    assert not (tmp_path / "bomb").exists()


def test_a_state_dict_inside_a_checkpoint_is_found(call, tmp_path):
    torch.save({"state_dict": base_weights(), "epoch": 5}, tmp_path / "w.pth")
    check(draw_with(call, "--ckpt", "w.pth"), None)


def test_old_pickles_do_not_run(call, tmp_path):
    """The format before zip files, for which torch has another reader."""
    torch.save(Bomb(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    check(draw_with(call, "--ckpt", "w.pth"), UNREADABLE)
    assert not (tmp_path / "bomb").exists()


def model_folder(folder, without=()):
    """Copy the tiny base, without some of its files."""
    shutil.copytree(ROOT / "shapes", folder,
                    ignore=shutil.ignore_patterns("magvitv2", "clip", "__pycache__", *without))
    return folder


INDEX = "pytorch_model.safetensors.index.json"
INDICES = {
    "empty": (b"", f"{INDEX}: is not JSON"),
    "cut": (b'{"weight_map": {"a', f"{INDEX}: is not JSON"),
    "deep": (DEEP, f"{INDEX}: is not JSON"),
    "a list": (b"[]", f"{INDEX}: holds no JSON object"),
    "no map": (b"{}", f"{INDEX}: names shards that are not there"),
    "map of a list": (b'{"weight_map": ["a"]}', "names shards that are not there"),
    "map of numbers": (b'{"weight_map": {"a": 5}}', "names shards that are not there"),
    "absent shards": (b'{"weight_map": {"a": "b.safetensors"}}', "shards that are not there"),
    "a folder": (b'{"weight_map": {"a": "."}}', "shards that are not there"),
    "itself": (json.dumps({"weight_map": {"a": INDEX}}).encode(), "cannot be read as a weights"),
    "long name": (json.dumps({"weight_map": {"a": LONG_NAME}}).encode(), "File name too long"),
    "no shard": (b'{"weight_map": {}}', "weights do not fit")}


@pytest.mark.parametrize("data, expected", cases(INDICES))
def test_indices_of_shards(call, tmp_path, data, expected):
    folder = model_folder(tmp_path / "m", without=["pytorch_model.safetensors"])
    (folder / INDEX).write_bytes(data)
    check(draw_with(call, "--ckpt", "m"), expected)


# ------------------------------------------------------------------------------ JSON of a model

def changed(name, **changes):
    """Return a JSON file of the tiny base with changes, as bytes."""
    return json.dumps(json.loads((ROOT / "shapes" / name).read_text()) | changes).encode()


config = functools.partial(changed, "config.json")
phi = functools.partial(changed, "phi_config.json")
tokenizer = functools.partial(changed, "tokenizer_config.json")
FILES = {
    "config whole": ("config.json", config(), None),
    "config with more": ("config.json", config(x=[1]), None),
    "config with a BOM": ("config.json", b"\xef\xbb\xbf" + config(), "m/config.json"),
    "config empty": ("config.json", b"", "config.json: is not JSON"),
    "config cut": ("config.json", cut(config()), "config.json: is not JSON"),
    "config deep": ("config.json", DEEP, "config.json: is not JSON"),
    "config in UTF-16": ("config.json", config().decode().encode("utf-16"), "is not JSON"),
    "config a list": ("config.json", b"[]", "config.json: holds no JSON object"),
    "config null": ("config.json", b"null", "config.json: holds no JSON object"),
    "config without keys": ("config.json", b"{}", "config.json: num_vq_tokens is None"),
    "config, K text": ("config.json", config(codebook_size="64"), "codebook_size is '64'"),
    "config, K a list": ("config.json", config(codebook_size=[64]), "codebook_size is [64]"),
    "config, K true": ("config.json", config(codebook_size=True), "codebook_size is True"),
    "config, K 64.0": ("config.json", config(codebook_size=64.0), "codebook_size is 64.0"),
    "config, K 0": ("config.json", config(codebook_size=0), "codebook_size is 0"),
    "config, K 65": ("config.json", config(codebook_size=65), "vocab_size"),
    "config, N -16": ("config.json", config(num_vq_tokens=-16), "num_vq_tokens is -16"),
    "config, N 15": ("config.json", config(num_vq_tokens=15), "do not fill a square"),
    "config, vocabulary": ("config.json", config(vocab_size=10 ** 30), "vocab_size"),
    "config, text vocabulary": ("config.json", config(llm_vocab_size=1), "room for 1"),
    "config, text vocabulary a list": ("config.json", config(llm_vocab_size=[1]),
                                       "llm_vocab_size is [1]"),
    "config, mask id": ("config.json", config(mask_token_id=0), "vocab_size"),
    "config, source a list": ("config.json", config(llm_model_path=["shapes"]), None),
    "phi whole": ("phi_config.json", phi(), None),
    "phi empty": ("phi_config.json", b"", "phi_config.json: is not JSON"),
    "phi cut": ("phi_config.json", cut(phi()), "phi_config.json: is not JSON"),
    "phi deep": ("phi_config.json", DEEP, "phi_config.json: is not JSON"),
    "phi a list": ("phi_config.json", b"[]", "phi_config.json: holds no JSON object"),
    "phi without keys": ("phi_config.json", b"{}", "weights do not fit"),
    "phi, width text": ("phi_config.json", phi(hidden_size="128"), "cannot build Showo"),
    "phi, width a list": ("phi_config.json", phi(hidden_size=[128]), "cannot build Showo"),
    "phi, width -128": ("phi_config.json", phi(hidden_size=-128), "cannot build Showo"),
    "phi, width 64": ("phi_config.json", phi(hidden_size=64), "weights do not fit"),
    "phi, no heads": ("phi_config.json", phi(num_attention_heads=0), "cannot build Showo"),
    "phi, 3 heads": ("phi_config.json", phi(num_attention_heads=3), "weights do not fit"),
    "phi, no layers": ("phi_config.json", phi(num_hidden_layers=0), "weights do not fit"),
    "phi, 5 layers": ("phi_config.json", phi(num_hidden_layers=5), "weights do not fit"),
    "phi, layers text": ("phi_config.json", phi(num_hidden_layers="4"), "cannot build Showo"),
    "phi, activation": ("phi_config.json", phi(hidden_act="magic"), "cannot build Showo"),
    "phi, activation 5": ("phi_config.json", phi(hidden_act=5), "cannot build Showo"),
    "phi, epsilon text": ("phi_config.json", phi(layer_norm_eps="x"), "config.json: "),
    "phi, rotary share text": ("phi_config.json", phi(partial_rotary_factor="x"), "config.json: "),
    "phi, rotary share 3": ("phi_config.json", phi(partial_rotary_factor=3.0), "config.json: "),
    "phi, rotary base text": ("phi_config.json", phi(rope_theta="x"), "config.json: "),
    "phi, a pad token": ("phi_config.json", phi(pad_token_id=10 ** 9), "cannot build Showo"),
    "tokenizer empty": ("tokenizer.json", b"", "m: cannot load it"),
    "tokenizer cut": ("tokenizer.json", cut((ROOT / "shapes/tokenizer.json").read_bytes()),
                      "m: cannot load it"),
    "tokenizer deep": ("tokenizer.json", DEEP, "m: cannot load it"),
    "tokenizer a list": ("tokenizer.json", b"[]", "m: cannot load it"),
    "tokenizer null": ("tokenizer.json", b"null", "m: cannot load it"),
    "tokenizer without keys": ("tokenizer.json", b"{}", "m: cannot load it"),
    "tokenizer noise": ("tokenizer.json", noise(b""), "m: cannot load it"),
    "its config empty": ("tokenizer_config.json", b"", "m: cannot load it"),
    "its config cut": ("tokenizer_config.json", cut(tokenizer()), "m: cannot load it"),
    "its config deep": ("tokenizer_config.json", DEEP, "m: cannot load it"),
    "its config a list": ("tokenizer_config.json", b"[]", "m: cannot load it"),
    "its config, class 5": ("tokenizer_config.json", tokenizer(tokenizer_class=5),
                            "m: cannot load it"),
    "its config, no bos": ("tokenizer_config.json", tokenizer(bos_token=None),
                           "m: cannot load it"),
    "its config, bos a list": ("tokenizer_config.json", tokenizer(bos_token=["a"]),
                               "m: cannot load it")}


@pytest.mark.parametrize("name, data, expected", cases(FILES))
def test_json_of_a_model(call, tmp_path, name, data, expected):
    (model_folder(tmp_path / "m") / name).write_bytes(data)
    check(call(sample.main, "--model", "m", "--vq", "shapes/magvitv2", "--prompt", "a star",
               "--steps", 1, "--out", "x.png"), expected)


def test_code_named_by_a_model_does_not_run(call, tmp_path):
    folder = model_folder(tmp_path / "m")
    names = {"AutoTokenizer": ["bad.Bad", "bad.Bad"], "AutoConfig": "bad.Bad"}
    (folder / "bad.py").write_text("open('bomb', 'w').close()\nclass Bad: pass\n")
    (folder / "config.json").write_bytes(config(auto_map=names))
    (folder / "phi_config.json").write_bytes(phi(auto_map=names))
    (folder / "tokenizer_config.json").write_bytes(tokenizer(auto_map=names))
    check(call(sample.main, "--model", "m", "--prompt", "a star", "--steps", 1, "--out", "x.png"),
          None)
    assert not (tmp_path / "bomb").exists()


VQ = {
    "empty": (b"", "config.json: is not JSON"),
    "deep": (DEEP, "config.json: is not JSON"),
    "a list": (b"[]", "config.json: holds no JSON object"),
    "no keys": (b"{}", "weights do not fit MAGVITv2"),
    "encoder 5": (b'{"encoder": 5}', "cannot build MAGVITv2"),
    "encoder of a list": (b'{"encoder": [5]}', "cannot build MAGVITv2"),
    "no levels": (b'{"encoder": {"ch": 32, "ch_mult": [], "num_res_blocks": [], '
                  b'"z_channels": 6}}', "weights do not fit MAGVITv2"),
    "channels of text": (b'{"encoder": {"ch": "32", "ch_mult": [1], "num_res_blocks": [1], '
                         b'"z_channels": 6}}', "cannot build MAGVITv2"),
    "60 bits": (b'{"encoder": {"ch": 32, "ch_mult": [1], "num_res_blocks": [1], '
                b'"z_channels": 60}}', "config.json: ")}


@pytest.mark.parametrize("data, expected", cases(VQ))
def test_json_of_an_image_tokenizer(call, tmp_path, data, expected):
    shutil.copytree(ROOT / "shapes/magvitv2", tmp_path / "vq")
    (tmp_path / "vq/config.json").write_bytes(data)
    check(draw_with(call, "--vq", "vq"), expected)


NO_MODEL = "no such file or folder, nor a hub id"
PLACES = {
    "model absent": (("--model", "absent"), NO_MODEL),
    "model absolute": (("--model", "/nope/nope"), NO_MODEL),
    "model above": (("--model", "../nope"), NO_MODEL),
    "model of three parts": (("--model", "a/b/c"), NO_MODEL),
    "model long": (("--model", LONG_NAME), ""),
    "model a folder": (("--model", "."), ": "),
    "model a text file": (("--model", "some.txt"), "some.txt"),
    "model /dev/null": (("--model", "/dev/null"), "/dev/null: "),
    "model on the hub": (("--model", "nobody/nothing"), "hf download nobody/nothing"),
    "model at a revision": (("--model", "nobody/nothing@abc"),
                            "hf download nobody/nothing --revision abc"),
    "ckpt absent": (("--ckpt", "absent"), NO_MODEL),
    "ckpt a folder": (("--ckpt", "."), ": "),
    "ckpt a text file": (("--ckpt", "some.txt"), "some.txt: cannot be read as a weights file"),
    "vq absent": (("--vq", "absent"), NO_MODEL),
    "vq a folder": (("--vq", "."), "config.json: cannot be read"),
    "vq a text file": (("--vq", "some.txt"), "config.json: cannot be read"),
    "tokenizer absent": (("--tokenizer", "absent"), NO_MODEL),
    "tokenizer a folder": (("--tokenizer", "."), "--tokenizer .: cannot load it"),
    "tokenizer a text file": (("--tokenizer", "some.txt"), "--tokenizer some.txt: cannot load"),
    "tokenizer /dev/null": (("--tokenizer", "/dev/null"), "--tokenizer /dev/null: cannot load"),
    "device unknown": (("--device", "banana"), "--device banana: cannot be used"),
    "device without one": (("--device", "cuda"), "--device cuda"),
    "device meta": (("--device", "meta"), "--device meta: cannot be used"),
    "device in two lines": (("--device", "a\nb"), "--device a")}


@pytest.mark.parametrize("flags, expected", cases(PLACES))
def test_places_of_weights(call, tmp_path, flags, expected):
    (tmp_path / "some.txt").write_text("a star\n")
    before = snapshot(tmp_path)
    check(draw_with(call, *flags), expected)
    check(call(train.main, *TRAIN, "--reward", "http:http://127.0.0.1:9/", *flags, "--out", "run"),
          expected)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)     # of a folder that was claimed
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------ pictures

def png(image, **how):
    """Return a PIL image as the bytes of a PNG, or of another format."""
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **how})
    return file.getvalue()


def chunk(kind, data):
    """Return a chunk of a PNG with its checksum."""
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def header_only(width, height):
    """Return a PNG that says how large it is, and holds nothing."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def with_chunk(kind, data):
    """Return a whole PNG with one more chunk after its header."""
    whole = png(PICTURE)
    return whole[:33] + chunk(kind, data) + whole[33:]


def text_bomb():
    """Return a PNG whose compressed comment unpacks to 100 MB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "0" * 10 ** 8, zip=True)
    return png(PICTURE, pnginfo=info)


PICTURE = Image.fromarray(shapes.paint({(1, 1): ("circle", "red")}, 0).permute(1, 2, 0).numpy())
BROKEN = "0.png: is not a readable picture"
PICTURES = {
    "whole": (png(PICTURE), None),
    "grey": (png(PICTURE.convert("L")), None),
    "two colours": (png(PICTURE.convert("1")), None),
    "palette": (png(PICTURE.convert("P")), None),
    "transparent": (png(PICTURE.convert("RGBA")), None),
    "16 bits": (png(Image.fromarray(np.full((48, 48), 60_000, np.uint16))), None),
    "a JPEG in CMYK": (png(PICTURE.convert("CMYK"), format="JPEG"), None),
    "a GIF": (png(PICTURE, format="GIF"), None),
    "bytes after the end": (png(PICTURE) + b"\0" * 100, None),
    "empty": (b"", BROKEN),
    "one byte": (b"\x89", BROKEN),
    "signature": (png(PICTURE)[:8], BROKEN),
    "header": (png(PICTURE)[:33], BROKEN),
    "cut": (cut(png(PICTURE)), BROKEN),
    "zeros": (zeros(png(PICTURE)), BROKEN),
    "noise": (noise(b""), BROKEN),
    "text": (b"a photo of a star\n", BROKEN),
    "HTML": (b"<!DOCTYPE html><html>404</html>", BROKEN),
    "bomb of 2.5 gigapixels": (header_only(50_000, 50_000), BROKEN),
    "bomb of 144 megapixels": (header_only(12_000, 12_000), BROKEN),
    "bomb of all sizes": (header_only(2 ** 31 - 1, 2 ** 31 - 1), BROKEN),
    "no size": (header_only(0, 0), BROKEN),
    "sizes below 0": (header_only(2 ** 32 - 1, 5), BROKEN),
    "bomb in a comment": (text_bomb(), BROKEN),
    "exif cut": (with_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x05\x01"), None),
    "exif noise": (with_chunk(b"eXIf", noise(b"")), BROKEN),
    "exif empty": (with_chunk(b"eXIf", b""), None),
    "exif orientation 99": (with_chunk(
        b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"), None),
    "profile of noise": (with_chunk(b"iCCP", b"x\0\0" + noise(b"")), None),
    "another size": (png(PICTURE.resize((40, 48))), "judges pictures of 48 x 48, not 40 x 48")}


@pytest.mark.parametrize("data, expected", cases(PICTURES))
def test_pictures(call, tmp_path, data, expected):
    samples = tmp_path / "pictures/00000/samples"
    samples.mkdir(parents=True)
    (samples / "0000.png").write_bytes(data)
    write_lines(tmp_path / "pictures/00000/metadata.jsonl", [example()])
    write_lines(tmp_path / "p.jsonl", [example()])
    before = snapshot(tmp_path)
    check(call(reward.main, "--reward", "geneval", "--detector", "shapes", "--images", "pictures",
               "--prompts", "p.jsonl"), expected)
    assert snapshot(tmp_path) == before
    check(call(eval_geneval.main, "--model", "shapes", "--score-only", "pictures"), expected)
    if expected:
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("most", [500, 600])
def test_a_picture_that_is_too_large_is_not_decoded(monkeypatch, tmp_path, recwarn, most):
    """Pillow refuses twice its limit, and only warns above it: both are too large here."""
    (tmp_path / "0.png").write_bytes(png(PICTURE))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    assert common.read_picture(tmp_path / "0.png") is None
    assert not len(recwarn)                 # a second line of stderr


LINE_OF_FOLDER = json.dumps(example()).encode()
LAYOUTS = {
    "whole": ("metadata.jsonl", LINE_OF_FOLDER, None),
    "indented": ("metadata.jsonl", json.dumps(example(), indent=2).encode(), None),
    "no metadata": ("metadata.jsonl", None, "metadata.jsonl: cannot be read"),
    "metadata empty": ("metadata.jsonl", b"", "metadata.jsonl: is not JSON"),
    "metadata cut": ("metadata.jsonl", cut(LINE_OF_FOLDER), "metadata.jsonl: is not JSON"),
    "metadata deep": ("metadata.jsonl", DEEP, "metadata.jsonl: is not JSON"),
    "metadata in Latin 1": ("metadata.jsonl", b'{"prompt": "caf\xe9"}', "is not JSON"),
    "metadata a list": ("metadata.jsonl", b"[]", "metadata.jsonl: holds no JSON object"),
    "metadata of another kind": ("metadata.jsonl", b'{"prompt": "a"}', "lacks GenEval metadata"),
    "metadata, position 0.0": ("metadata.jsonl",
                               json.dumps(positioned(["left of", 0.0])).encode(),
                               "lacks GenEval metadata"),
    "no picture": ("samples/0000.png", None, "samples: holds no picture"),
    "other names": ("samples/grid.png", png(PICTURE), None)}


@pytest.mark.parametrize("name, data, expected", cases(LAYOUTS))
def test_folders_to_score(call, tmp_path, name, data, expected):
    folder = tmp_path / "pictures/00000"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples/0000.png").write_bytes(png(PICTURE))
    (folder / "metadata.jsonl").write_bytes(LINE_OF_FOLDER)
    (folder / name).unlink(missing_ok=True)
    if data is not None:
        (folder / name).write_bytes(data)
    before = snapshot(tmp_path)
    check(call(eval_geneval.main, "--model", "shapes", "--score-only", "pictures"), expected)
    if expected:
        assert snapshot(tmp_path) == before


DRAWN = {
    "as it was": ("settings.json", "settings.json", None),
    "settings cut": ("settings.json", b'{"model"', "settings.json: is not JSON"),
    "settings deep": ("settings.json", DEEP, "settings.json: is not JSON"),
    "settings a list": ("settings.json", b"[]", "settings.json: holds no JSON object"),
    "settings of others": ("settings.json", b"{}", "was drawn with other settings"),
    "settings gone": ("settings.json", None, "is not empty, and not a folder of this program"),
    "another prompt": ("00000/metadata.jsonl", b"{}", "00000 belongs to another prompt"),
    "metadata not UTF-8": ("00000/metadata.jsonl", b"\xff\xfe", "00000"),
    "a picture gone": ("00000/samples/0000.png", None, None),
    "a picture cut": ("00000/samples/0000.png", b"\x89PNG", None)}


@pytest.mark.parametrize("name, data, expected", cases(DRAWN))
def test_folders_to_draw_in(call, tmp_path, name, data, expected):
    path = write_lines(tmp_path / "p.jsonl", [example()])
    flags = ("--model", "shapes", "--prompts", path, "--n", 1, "--steps", 1, "--out", "out")
    check(call(eval_geneval.main, *flags), None)
    picture = (tmp_path / "out/00000/samples/0000.png").read_bytes()
    if data is None:
        (tmp_path / "out" / name).unlink()
    elif isinstance(data, bytes):
        (tmp_path / "out" / name).write_bytes(data)
    before = snapshot(tmp_path)
    check(call(eval_geneval.main, *flags), expected)
    if expected:
        assert snapshot(tmp_path) == before
    else:
        assert (tmp_path / "out/00000/samples/0000.png").read_bytes() == picture


# ------------------------------------------------------------------------------ runs

RUN = (*TRAIN, "--eval-every", 1, "--eval-n", 1, "--eval-unmask-steps", 1, "--save-every", 1,
       "--filter-low", "--filter-warmup", 1)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of two steps, each one saved."""
    out = tmp_path_factory.mktemp("whole") / "run"
    patch = pytest.MonkeyPatch()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    patch.setattr(sys, "argv", ["train.py", *map(str, RUN), "--steps", "2", "--out", str(out)])
    train.main()
    patch.undo()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return out


@pytest.fixture
def run(whole_run, tmp_path):
    """A copy of that run."""
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def resume(call, run, *flags):
    """Go back to the first checkpoint of a run, and on to its second step."""
    return call(train.main, *RUN, "--steps", 2, "--resume", run / "checkpoint-1", *flags)


def test_a_whole_run_resumes(call, run):
    check(resume(call, run), None)
    assert [row["step"] for row in checkpoint.read_rows(run / "metrics.jsonl")] == [1, 2]


def put(value, *keys):
    """Return a function that sets a value somewhere inside a trainer's dict."""
    def change(trainer):
        for key in keys[:-1]:
            trainer = trainer[key]
        trainer[keys[-1]] = value
    return change


def drop(*keys):
    """Return a function that removes something inside a trainer's dict."""
    def change(trainer):
        for key in keys[:-1]:
            trainer = trainer[key]
        del trainer[keys[-1]]
    return change


def without_state(trainer):
    trainer["optimizer"]["state"] = {}


NOT_OURS = "trainer.pt: was not written by train.py"
NO_FIT = "trainer.pt does not fit"
STATE = ("optimizer", "state")
GROUP = ("optimizer", "param_groups", 0)
TRAINERS = {
    **{f"no {name}": (drop(name), NOT_OURS)
       for name in ("step", "world", "n_bad", "args", "optimizer", "filter")},
    "step text": (put("1", "step"), NOT_OURS),
    "step true": (put(True, "step"), NOT_OURS),
    "step a tensor": (put(torch.tensor(1), "step"), NOT_OURS),
    "step -1": (put(-1, "step"), "trainer.pt"),
    "step of 31 digits": (put(10 ** 30, "step"), "that run is past --steps 2"),
    "world null": (put(None, "world"), NOT_OURS),
    "n_bad a list": (put([1], "n_bad"), NOT_OURS),
    "args a list": (put([], "args"), NOT_OURS),
    "args empty": (put({}, "args"), "that run has --model None, not shapes"),
    "args, a group of text": (put("2", "args", "group_size"), "has --group-size 2, not 2"),
    "args, a model of lists": (put([[]], "args", "model"), "has --model [[]], not shapes"),
    "filter a list": (put([], "filter"), NOT_OURS),
    "filter empty": (put({}, "filter"), "trainer.pt"),
    "history 5": (put(5, "filter", "history"), "trainer.pt"),
    "history of text": (put(["a"], "filter", "history"), "trainer.pt"),
    "history of lists": (put([[1.0], 2.0], "filter", "history"), "trainer.pt"),
    "optimizer 5": (put(5, "optimizer"), NOT_OURS),
    "optimizer empty": (put({}, "optimizer"), NO_FIT),
    "state a list": (put([1], *STATE), NO_FIT),
    "state 5": (put(5, *STATE), NO_FIT),
    "state of text": (put("x", *STATE, 0), NO_FIT),
    "state 5 of a weight": (put(5, *STATE, 0), NO_FIT),
    "state a list of a weight": (put([1], *STATE, 0), NO_FIT),
    "state of another model": (put(torch.zeros(3), *STATE, 0, "exp_avg"), NO_FIT),
    "state, both of another": (put({"step": torch.tensor(1.0), "exp_avg": torch.zeros(3),
                                    "exp_avg_sq": torch.zeros(3)}, *STATE, 0), NO_FIT),
    "state without moments": (drop(*STATE, 0, "exp_avg_sq"), NO_FIT),
    "state without a step": (drop(*STATE, 0, "step"), NO_FIT),
    "state, step text": (put("1", *STATE, 0, "step"), NO_FIT),
    "state, moments text": (put("x", *STATE, 0, "exp_avg"), NO_FIT),
    "groups 5": (put(5, "optimizer", "param_groups"), NO_FIT),
    "no groups": (put([], "optimizer", "param_groups"), NO_FIT),
    "a group 5": (put([5], "optimizer", "param_groups"), NO_FIT),
    "a group empty": (put([{}], "optimizer", "param_groups"), NO_FIT),
    "parameters missing": (put([0], *GROUP, "params"), NO_FIT),
    "parameters 5": (put(5, *GROUP, "params"), NO_FIT),
    "betas missing": (drop(*GROUP, "betas"), NO_FIT),
    "betas text": (put("ab", *GROUP, "betas"), NO_FIT),
    "epsilon text": (put("x", *GROUP, "eps"), NO_FIT),
    "no state yet": (without_state, None)}


@pytest.mark.parametrize("change, expected", cases(TRAINERS))
def test_crafted_trainers(call, run, change, expected):
    path = run / "checkpoint-1/trainer.pt"
    trainer = torch.load(path)
    change(trainer)
    torch.save(trainer, path)
    before = snapshot(run)
    check(resume(call, run), expected)
    if expected:
        assert snapshot(run) == before


@pytest.mark.parametrize("content, expected", cases({
    "a list": ([1], NOT_OURS),
    "5": (5, NOT_OURS),
    "null": (None, NOT_OURS),
    "a tensor": (torch.zeros(1), NOT_OURS),
    "no keys": ({}, NOT_OURS),
    "code": ({"step": Bomb()}, "trainer.pt: cannot be read")}))
def test_trainers_that_are_none(call, run, tmp_path, content, expected):
    torch.save(content, run / "checkpoint-1/trainer.pt")
    before = snapshot(run)
    check(resume(call, run), expected)
    assert snapshot(run) == before and not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("name", ["trainer.pt", "pytorch_model.safetensors", "config.json",
                                  "phi_config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [empty, cut, zeros, noise])
def test_damaged_checkpoints(call, run, name, damage):
    path = run / "checkpoint-1" / name
    path.write_bytes(damage(path.read_bytes()))
    before = snapshot(run)
    check(resume(call, run), "checkpoint-1")
    assert snapshot(run) == before


ROW = b'{"step": 1, "overall": 0.5}\n'
BAD_ROW = "line 1 is no row of a run"
ROWS = {
    "empty": (b"", None),
    "last line cut": (ROW + b'{"step": 2, "ove', None),
    "last line of NULs": (ROW + b"\0" * 100, None),
    "last line not UTF-8": (ROW + b"\xff\xfe", None),
    "last line deep": (ROW + DEEP, None),
    "no newline": (ROW.strip(), None),
    "a step of 31 digits": (ROW + b'{"step": 1' + b"0" * 30 + b"}\n", None),
    "not finite": (b'{"step": 0, "overall": NaN}\n' + ROW, None),
    "an old row of text": (b'{"step": 0, "overall": "x", "exact": [1]}\n' + ROW, None),
    "middle cut": (b'{"step"\n' + ROW, "line 1 is not JSON"),
    "middle empty": (ROW + b"\n" + ROW, "line 2 is not JSON"),
    "middle of NULs": (ROW + b"\0" * 9 + b"\n" + ROW, "line 2 is not JSON"),
    "middle deep": (DEEP + b"\n" + ROW, "line 1 is not JSON"),
    "middle not UTF-8": (b"\xff\xfe\n" + ROW, "line 1 is not JSON"),
    "two rows in a line": (ROW.strip() * 2 + b"\n" + ROW, "line 1 is not JSON"),
    "a list": (b"[1]\n" + ROW, BAD_ROW),
    "a number": (b"5\n" + ROW, BAD_ROW),
    "no step": (b'{"a": 1}\n' + ROW, BAD_ROW),
    "step text": (b'{"step": "1"}\n' + ROW, BAD_ROW),
    "step true": (b'{"step": true}\n' + ROW, BAD_ROW),
    "step 0.5": (b'{"step": 0.5}\n' + ROW, BAD_ROW),
    "last line without a step": (ROW + b"{}", "line 2 is no row of a run")}


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
@pytest.mark.parametrize("data, expected", cases(ROWS))
def test_damaged_rows(call, run, name, data, expected):
    (run / name).write_bytes(data)
    before = snapshot(run)
    check(resume(call, run), expected and f"{name}: {expected}")
    if expected:
        assert snapshot(run) == before
    else:
        assert checkpoint.read_rows(run / name)[-1]["step"] == 2


# ------------------------------------------------------------------------------ flags

WHOLE = ["x", "", "1.5", "1e3", "nan", "inf", "9" * 400, "0x10"]
NUMBER = ["x", "", "nan", "inf", "-inf", "1e400", "1,5"]
NUMERIC = {
    "--steps": ["0", "-1", *WHOLE],
    "--group-size": ["1", "0", "4097", *WHOLE],
    "--prompts-per-step": ["0", "-1", *WHOLE],
    "--unmask-steps": ["0", "-1", *WHOLE],
    "--filter-warmup": ["0", *WHOLE],
    "--max-resample": ["0", "101", *WHOLE],
    "--loss-steps": ["0", "-1", *WHOLE],
    "--inner-epochs": ["0", "101", *WHOLE],
    "--warmup": ["-1", *WHOLE],
    "--micro-batch": ["0", *WHOLE],
    "--eval-every": ["-1", *WHOLE],
    "--eval-n": ["0", *WHOLE],
    "--eval-unmask-steps": ["0", *WHOLE],
    "--sample-every": ["-1", *WHOLE],
    "--save-every": ["-1", *WHOLE],
    "--keep-last": ["-1", *WHOLE],
    "--max-bad-steps": ["0", *WHOLE],
    "--seed": ["-1", "2147483649", *WHOLE],
    "--reward-timeout": ["-1", "0", "1e300", *NUMBER],
    "--reward-patience": ["-1", "1e300", *NUMBER],
    "--clip-low": ["-0.1", "1.1", *NUMBER],
    "--clip-high": ["0.9", "-1", *NUMBER],
    "--kl-beta": ["-0.1", *NUMBER],
    "--filter-percentile": ["-1", "100.1", *NUMBER],
    "--lr": ["-1", *NUMBER],
    "--weight-decay": ["-1", *NUMBER],
    "--max-grad-norm": ["-1", *NUMBER],
    "--guidance": ["-1", *NUMBER],
    "--eval-guidance": ["-1", *NUMBER],
    "--lora": ["0", "-1", *WHOLE]}


def test_the_table_holds_every_numeric_flag(monkeypatch):
    parsers, parse = [], common.Parser.parse_args

    def parse_args(self, *rest):
        parsers.append(self)
        return parse(self, *rest)
    monkeypatch.setattr(common.Parser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", ["train.py", *TRAIN])
    train.parse_args()
    numeric = {action.option_strings[0] for action in parsers[0]._actions
               if action.type not in (None, str)}
    assert numeric == set(NUMERIC)


@pytest.mark.parametrize("flag", NUMERIC)
def test_numbers_out_of_range(call, flag):
    for value in NUMERIC[flag]:
        check(call(train.parse_args, *TRAIN, f"{flag}={value}"), f"argument {flag}: ")


SAMPLER = {
    "steps 0": (("--steps", "0"), "--steps: 0 is out of range"),
    "n 0": (("--n", "0"), "--n: 0 is out of range"),
    "n of 400 digits": (("--n", "9" * 400), "--n: "),
    "batch 0": (("--batch", "0"), "--batch: 0 is out of range"),
    "seed -1": (("--seed", "-1"), "--seed: -1 is out of range"),
    "seed 2 ** 41": (("--seed", str(2 ** 41)), "--seed: "),
    "seed 2 ** 40": (("--seed", str(2 ** 40)), None),
    "cfg -1": (("--cfg", "-1"), "--cfg: -1 is out of range"),
    "cfg inf": (("--cfg", "inf"), "--cfg: inf is out of range"),
    "cfg nan": (("--cfg", "nan"), "--cfg: nan is out of range"),
    "cfg 1e38": (("--cfg", "1e38"), "--cfg: 1e38 is out of range, it must be from 0 to"),
    "cfg 1e308": (("--cfg", "1e308"), "--cfg: 1e308 is out of range, it must be from 0 to"),
    "cfg 1e5": (("--cfg", "1e5"), None),
    "temperature nan": (("--temperature", "nan"), "--temperature: nan is out of range"),
    "temperature 0": (("--temperature", "0"), None),
    "temperature 1e11": (("--temperature", "1e11"), None),
    "temperature 1e300": (("--temperature", "1e300"), "--temperature: 1e300 is out of range"),
    "schedule": (("--schedule", "square"), "--schedule: invalid choice"),
    "annealing": (("--annealing", "5"), "--annealing: invalid choice"),
    "dtype": (("--dtype", "fp16"), "--dtype: invalid choice"),
    "more steps than tokens": (("--steps", "100"), None),
    "unknown flag": (("--stepz", "5"), "unrecognized arguments: --stepz"),
    "cut flag": (("--annea", "none"), "unrecognized arguments: --annea"),
    "no value": (("--steps",), "--steps: expected one argument"),
    "out a folder": (("--out", "folder.png"), None),
    "out a new folder": (("--out", "two\nlines/deep"), None),
    "out a file": (("--out", "file"), "--out file: must be a .png, or a folder"),
    "out in two lines": (("--out", "two\nlines.png/x.png"), "must be a .png in a folder"),
    "out nowhere": (("--out", "nowhere/x.png"), "nowhere/x.png: must be a .png in a folder"),
    "out under a file": (("--out", "file/x.png"), "file/x.png: must be a .png in a folder"),
    "out a folder under a file": (("--out", "file/x"), "file/x"),
    "out /dev/null": (("--out", "/dev/null"), "--out /dev/null: must be a .png, or a folder"),
    "out a folder of 300 letters": (("--out", LONG_NAME), "File name too long"),
    "out a folder in /proc": (("--out", "/proc/x"), "/proc/x"),
    "out of 300 letters": (("--out", f"{LONG_NAME}.png"), "File name too long"),
    "out on a full disk": (("--out", "full.png"), "No space left"),
    "out in /proc": (("--out", "/proc/x.png"), "/proc/x.png")}


@pytest.mark.parametrize("flags, expected", cases(SAMPLER))
def test_flags_of_the_sampler(call, tmp_path, flags, expected):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept\n")
    (tmp_path / "full.png").symlink_to("/dev/full")
    check(draw_with(call, *flags), expected)
    assert (tmp_path / "file").read_text() == "kept\n" and (tmp_path / "full.png").is_symlink()


OUTPUTS = {
    "/dev/null": ("/dev/null", "/dev/null"),
    "below /dev/null": ("/dev/null/run", "/dev/null"),
    "a file": ("file", "file"),
    "below a file": ("file/run", "file"),
    "300 letters": (LONG_NAME, "File name too long"),
    "300 letters below": (f"new/{LONG_NAME}", "File name too long"),
    "read-only": ("/proc/run", "/proc/run"),
    "a dangling link": ("dangling", "dangling"),
    "a link to itself": ("loop", "loop")}


@pytest.mark.parametrize("out, expected", cases(OUTPUTS))
def test_output_folders(call, tmp_path, out, expected):
    (tmp_path / "file").write_text("kept\n")
    (tmp_path / "dangling").symlink_to("/proc/nothing/at/all")
    (tmp_path / "loop").symlink_to("loop")
    check(call(train.main, *TRAIN, "--out", out), expected)
    check(call(eval_geneval.main, "--model", "shapes", "--n", 1, "--steps", 1, "--images-only",
               "--out", out), expected)
    assert (tmp_path / "file").read_text() == "kept\n"


def test_an_output_folder_whose_name_is_no_text(call):
    """safetensors cannot write there: better said at the start than after the last step."""
    check(call(train.main, *TRAIN, "--out", "run\udcff"), "run")


def test_a_full_disk_is_said_and_the_run_goes_on_elsewhere(call, run):
    """metrics.jsonl cannot grow: one line; the checkpoint before is as it was."""
    before = snapshot(run / "checkpoint-2")
    plain = open

    def full(path, mode="r", *rest, **how):
        return plain("/dev/full" if "a" in mode and "metrics" in str(path) else path, mode, *rest,
                     **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "open", full, raising=False)
        check(call(train.main, *RUN, "--steps", 3, "--resume", "--out", run),
              "metrics.jsonl: cannot be written (No space left on device)")
    assert snapshot(run / "checkpoint-2") == before
    check(call(train.main, *RUN, "--steps", 3, "--resume", "--out", run), None)


NO_TRAINER = "no checkpoint of train.py"
RESUMES = {
    "no out": (("--resume",), "--resume without a checkpoint needs --out"),
    "nothing": (("--resume", ""), "--resume"),
    "out empty": (("--resume", "--out", "empty"), "--resume: no checkpoint in empty"),
    "out absent": (("--resume", "--out", "absent"), "--resume: no checkpoint in absent"),
    "out a file": (("--resume", "--out", "file"), "--resume: no checkpoint in file"),
    "out long": (("--resume", "--out", LONG_NAME), ""),
    "absent": (("--resume", "absent"), f"absent: {NO_TRAINER}"),
    "a file": (("--resume", "file"), f"file: {NO_TRAINER}"),
    "a run": (("--resume", "run"), f"run: {NO_TRAINER}"),
    "a base": (("--resume", ROOT / "shapes"), f"shapes: {NO_TRAINER}"),
    "/dev/null": (("--resume", "/dev/null"), f"/dev/null: {NO_TRAINER}"),
    "long": (("--resume", LONG_NAME), ""),
    "past the steps": (("--resume", "run/checkpoint-2", "--steps", 1), "is past --steps 1"),
    "another seed": (("--resume", "run/checkpoint-1", "--seed", 7), "has --seed 42, not 7"),
    "another group": (("--resume", "run/checkpoint-1", "--group-size", 4), "--group-size 2, not"),
    "other iterations": (("--resume", "run/checkpoint-1", "--unmask-steps", 2),
                         "has --unmask-steps 1, not 2"),
    "other epochs": (("--resume", "run/checkpoint-1", "--inner-epochs", 2), "--inner-epochs 1"),
    "another transition": (("--resume", "run/checkpoint-1", "--transition", "p1"),
                           "has --transition p2, not p1"),
    "another trajectory": (("--resume", "run/checkpoint-1", "--trajectory", "forward"),
                           "has --trajectory rollout, not forward"),
    "with a KL": (("--resume", "run/checkpoint-1", "--kl"), "has --kl False, not True"),
    "into another run": (("--resume", "run/checkpoint-1", "--out", "other"), "holds another run"),
    "over a run": (("--out", "run"), "run: holds another run"),
    "over another run": (("--out", "other"), "other: holds another run")}


@pytest.mark.parametrize("flags, expected", cases(RESUMES))
def test_resumes(call, run, tmp_path, flags, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_bytes(ROW)
    before = snapshot(tmp_path)
    check(call(train.main, *RUN, "--steps", 2, *flags), expected)
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------ rewards

WEIGHT = "the weight must be a finite number"
WANTED_URL = "wanted http:URL"
SPECS = {
    "exact": ("geneval", None),
    "weighted": ("geneval:exact:-2.5", None),
    "weight 0": ("geneval:0", None),
    "two": ("geneval:exact, geneval:partial:0.5", None),
    "empty": ("", "'' is not known"),
    "a comma": (",", "'' is not known"),
    "a comma at the end": ("geneval,", "'' is not known"),
    "unknown": ("beauty", "'beauty' is not known"),
    "unknown beside": ("geneval,beauty:2", "'beauty' is not known"),
    "in capitals": ("GENEVAL", "'GENEVAL' is not known"),
    "in two lines": ("a\nb", "is not known"),
    "Chinese": ("美", "'美' is not known"),
    "weight nan": ("geneval:exact:nan", WEIGHT),
    "weight inf": ("geneval:inf", WEIGHT),
    "weight 1e400": ("geneval:exact:1e400", WEIGHT),
    "rule": ("geneval:most", "geneval:most: the rule must be exact, strict or partial"),
    "rule empty": ("geneval::", "--reward geneval"),
    "two weights": ("geneval:exact:1:2", "the rule must be exact, strict or partial"),
    "hpsv2": ("hpsv2:nofile", "--reward hpsv2:nofile: wanted v2.0, v2.1 or a file"),
    "http alone": ("http:", WANTED_URL),
    "a plain URL": ("http://127.0.0.1:9/score", WANTED_URL),
    "ftp": ("http:ftp://127.0.0.1/score", WANTED_URL),
    "a file": ("http:file:///etc/passwd", WANTED_URL),
    "no host": ("http:http://", WANTED_URL),
    "port of letters": ("http:http://host:port/score", "no number"),
    "port too large": ("http:http://host:99999/score", "no number"),
    "half an address": ("http:http://[::1/score", "no number"),
    "URL's weight": ("http:http://host/score:heavy", WANTED_URL),
    "password, no port": ("http:http://name:secret@host:x/score", "no number"),
    "password with an @": ("http:http://name:a@secret@host:x/score", "no number"),
    "password beside": ("http:http://name:secret@host/score,beauty", "'beauty' is not known")}


@pytest.mark.parametrize("spec, expected", cases(SPECS))
def test_reward_specs(call, tmp_path, spec, expected):
    said = call(train.main, *TRAIN, "--out", "run", f"--reward={spec}")
    check(said, expected)
    assert (tmp_path / "run").exists() == (expected is None)
    assert "secret" not in (said or "")


URLS = {
    "nobody there": "http://127.0.0.1:9/score",
    "a space": "http://127.0.0.1:9/a b",
    "a letter of no ASCII": "http://127.0.0.1:9/é",
    "a name of 70 letters": f"http://{'a' * 70}/score",
    "an empty label": "http://a..b/score",
    "a control character": "http://127.0.0.1:9/\x01"}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_servers_that_cannot_be_asked(call, tmp_path, url):
    """One line after the step; the policy as it was is saved."""
    said = call(train.main, *TRAIN, "--out", "run", f"--reward=http:{url}", "--reward-patience",
                0)
    check(said, "--reward http://")
    assert "continue with --resume" in said and (tmp_path / "run/checkpoint-1").exists()


IMAGES = {
    "none": ("empty", "p.jsonl", "empty: 0 PNGs for 1 prompts"),
    "absent": ("absent", "p.jsonl", "absent: 0 PNGs for 1 prompts"),
    "a file": ("p.jsonl", "p.jsonl", "0 PNGs for 1 prompts"),
    "not as many": ("two", "three.jsonl", "2 PNGs for 3 prompts"),
    "no metadata": ("two", "plain.txt", "every prompt needs GenEval metadata"),
    "two of one": ("two", "p.jsonl", None)}


@pytest.mark.parametrize("images, prompts, expected", cases(IMAGES))
def test_folders_of_pictures(call, tmp_path, images, prompts, expected):
    for name in ("empty", "two"):
        (tmp_path / name).mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "two" / name).write_bytes(png(PICTURE))
    write_lines(tmp_path / "p.jsonl", [example()])
    write_lines(tmp_path / "three.jsonl", [example()] * 3)
    (tmp_path / "plain.txt").write_text("a star\n")
    check(call(reward.main, "--reward", "geneval", "--detector", "shapes", "--images", images,
               "--prompts", prompts), expected)
