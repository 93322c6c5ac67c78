"""The mistakes that users make every week end in one plain line that says what to do, printed by
one process; and faults that were found once, each with a test."""
import ast
import base64
import gc
import http.server
import json
import re
import shutil
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from conftest import ROOT, metrics, serving
from safetensors.torch import load_file, save_file

import checkpoint
import common
import eval_geneval
import reward
import sample
import shapes
import train

FLAGS = ("--model shapes --no-kl --prompts-per-step 2 --group-size 2 --unmask-steps 2 --steps 1 "
         "--eval-every 0 --save-every 0").split()


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A working folder of its own, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def call(monkeypatch, script, *flags):
    """Run a script's main()."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    script.main()


def line_of(monkeypatch, script, *flags):
    """Return the line with which a script's main() ends."""
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, script, *flags)
    said = end.value.code
    assert isinstance(said, str) and "\n" not in said
    del end
    gc.collect()        # the traceback holds main's lock of its folder
    return said


def write_lines(name, lines):
    with open(name, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


# ------------------------------------------------------------------------------ one plain line

COW = {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a cow"}


@pytest.mark.parametrize("script, flags, message", [
    (train, "--model nobody/nothing --reward clip:shapes/clip", "no such file or folder "
     "here, and .*: hf download nobody/nothing$"),
    (train, "--model /nope --reward clip:shapes/clip", "^/nope: no such file or folder here"),
    (train, "--ckpt half.safetensors", "half.safetensors: 1 weights do not fit Showo, such as "
     "showo.lm_head.bias"),
    (train, "--ckpt /nope.pth", "^/nope.pth: no such file"),
    (train, "--vq other", "^--vq other: its codebook is not of the model's size, 256$"),
    (train, "--prompts /nope.txt", "^/nope.txt: cannot be read"),
    (train, "--prompts table.xlsx", "^table.xlsx: wanted "),
    (train, "--prompts plain.txt --reward geneval", "needs? a tag and metadata .* not .* of "
     "'a photo of a cat'$"),
    (train, "--prompts cow.jsonl --reward geneval", "the detector knows, not .*cow.* of 'a cow'$"),
    (eval_geneval, "--model shapes --out x --prompts plain.txt", "a tag and metadata"),
    (train, "--reward nonsense", "^--reward: 'nonsense' is none of clip, "),
    (train, "--reward clip:/nope", "^/nope: no such file or folder here"),
    (train, "--reward geneval:nonsense", "^--reward geneval:nonsense: wanted exact, "),
    (train, "--resume --out nowhere", "^--resume: there is no checkpoint in nowhere$"),
    (train, "--resume", "^--resume: give the run's folder, --out DIR, or --resume "),
    (train, "--device cuda:9", "^--device cuda:9: there is none "),
    (train, "--device tpu", "^--device tpu: there is none "),
    (train, "--wandb project", "^--wandb needs a package: pip install wandb$"),
    (train, "--zero", "^--zero shards over processes: start with torchrun "),
    (train, "--loss-steps 3", "^--loss-steps 3 is more than --unmask-steps 2$"),
    (train, "--group-sizes 3", "unrecognized arguments: --group-sizes 3$"),
    (train, "--steps many", "argument --steps: invalid int value: 'many'$"),
    (sample, "--model shapes", "^give --prompt TEXT, or --prompts FILE$")])
def test_a_mistake_ends_in_one_line(monkeypatch, tmp_path, script, flags, message):
    (tmp_path / "plain.txt").write_text("a photo of a cat\n")
    (tmp_path / "table.xlsx").write_text("x")
    write_lines("cow.jsonl", [COW])
    weights = load_file(ROOT / "shapes/pytorch_model.safetensors")
    save_file({k: w for k, w in weights.items() if "head.bias" not in k}, "half.safetensors")
    shutil.copytree(ROOT / "tests/data/magvit", tmp_path / "other")
    given = [*(FLAGS if script is train else ()), *flags.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        said = line_of(monkeypatch, script, *given)
    assert re.search(message, said), said


@pytest.mark.parametrize("start", [(), ("-m", "torch.distributed.run", "--standalone",
                                        "--nproc_per_node", "2")])
def test_as_a_user_starts_it_one_process_says_it(start):
    done = subprocess.run(
        [sys.executable, *start, ROOT / "train.py", *FLAGS, "--reward", "nonsense"],
        capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    said = [line for line in lines if "--reward: 'nonsense' is none of clip" in line]
    assert len(said) == 1
    assert start or lines[-1] == said[0]
    assert f'File "{ROOT}/train.py"' not in done.stderr         # no traceback of ours


def test_a_lack_of_gpu_memory_says_what_to_try(monkeypatch, capsys):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    monkeypatch.setattr(common, "STORE", None)
    monkeypatch.setattr(common.os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        common.run(too_much.__get__(0))
    said = capsys.readouterr().err
    assert all(flag in said for flag in ("--micro-batch", "--grad-checkpoint", "--lora"))


# ------------------------------------------------------------------------------ servers

class Scores(http.server.BaseHTTPRequestHandler):
    """A server of rewards: it answers the pictures' mean colours until it is gone."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.headers_seen = getattr(server, "headers_seen", []) + [self.headers]
        gone = len(server.headers_seen) > getattr(server, "answers", 10 ** 6)
        scores = [float(len(image)) for image in body["images"]]
        content = json.dumps({"scores": scores}).encode()
        self.send_response(503 if gone else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def test_a_server_that_stays_away_ends_the_run_which_then_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(reward.time, "sleep", lambda seconds: None)
    with serving(Scores) as server:
        server.answers = 2
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        flags = (*FLAGS, "--steps", 4, "--save-every", 1, "--reward", f"http:{url}", "--out", "run")
        said = line_of(monkeypatch, train, *flags)
        assert said.startswith(f"--reward {url}: no scores (") and said.endswith("--resume")
        assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
        server.answers = 10 ** 6
        call(monkeypatch, train, *flags, "--resume")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_password_is_sent_and_shown_nowhere(monkeypatch, tmp_path, capfd):
    with serving(Scores) as server:
        address = f"127.0.0.1:{server.server_address[1]}/"
        call(monkeypatch, train, *FLAGS, "--reward", f"http:http://me:secret@{address}", "--out",
             "run")
    sent = server.headers_seen[0]["Authorization"]
    assert base64.b64decode(sent.removeprefix("Basic ")) == b"me:secret"
    said = capfd.readouterr()
    assert "secret" not in said.out + said.err and f"http://{address}" in said.out
    assert not any(b"secret" in file.read_bytes() for file in (tmp_path / "run").rglob("*")
                   if file.is_file())


# ------------------------------------------------------------------------------ found once

@pytest.fixture
def another_model(tmp_path, monkeypatch):
    """Flags of a model that is not shapes by name; shapes' detector judges its GenEval reward."""
    ignore = shutil.ignore_patterns("magvitv2", "clip", "*.py")
    folder = shutil.copytree(ROOT / "shapes", tmp_path / "other", ignore=ignore)
    config = checkpoint.read_json(folder / "config.json") | {"llm_model_path": "microsoft/phi-1_5"}
    checkpoint.write_json(folder / "config.json", config)

    def make_reward(spec, *, detector=None, **settings):
        return reward.make_reward(spec, detector=detector or shapes.detect, **settings)
    monkeypatch.setattr(train, "make_reward", make_reward)
    return [*FLAGS, "--model", folder, "--vq", "shapes/magvitv2"]


@pytest.mark.parametrize("evaluated", ["with metadata", "default"])
def test_geneval_as_a_reward_is_evaluated_and_draws_its_grids(
        monkeypatch, another_model, tmp_path, evaluated):
    write_lines("p.jsonl", [COW])
    flags = [*another_model, "--reward", "geneval", "--eval-n", 1, "--eval-unmask-steps", 1,
             "--eval-every", 1, "--prompts", "p.jsonl", "--out", "run"]
    call(monkeypatch, train, *flags, *(["--eval-prompts", "p.jsonl"] * (evaluated != "default")))
    assert (tmp_path / "run/samples/before_after.png").exists()
    first, last = checkpoint.read_rows(tmp_path / "run/eval.jsonl")
    assert len(first) == len(last) == (4 if evaluated != "default" else 9)  # a column for each tag


def test_training_starts_from_other_weights(monkeypatch, tmp_path):
    state = load_file(ROOT / "shapes/pytorch_model.safetensors")
    state = {name: weight * 0.5 for name, weight in state.items()}
    save_file(state, "w.safetensors")
    call(monkeypatch, train, *FLAGS, "--lr", 0, "--ckpt", "w.safetensors", "--out", "run")
    saved = load_file(tmp_path / "run/checkpoint-1/pytorch_model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)


def test_a_checkpoint_of_shapes_has_the_defaults_of_shapes(monkeypatch, tmp_path):
    call(monkeypatch, train, *FLAGS, "--out", "run")
    args = {}
    for model in ("shapes", "run/checkpoint-1"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", model])
        args[model] = vars(train.parse_args()) | {"model": None}
    assert args["shapes"] == args["run/checkpoint-1"]
    call(monkeypatch, train, *FLAGS, "--model", "run/checkpoint-1", "--out", "again")
    call(monkeypatch, sample, "--model", "run/checkpoint-1", "--prompt", "a star", "--out", "x.png")
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("file, wanted", [("sample", {"math", "dataclasses", "torch"}),
                                          ("grpo", {"torch"})])
def test_what_is_pasted_needs_torch_alone(file, wanted):
    tree = ast.parse((ROOT / f"{file}.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == wanted


def test_captions_begin_with_the_score(monkeypatch):
    captions, plain = [], common.grid

    def grid(images, texts, columns):
        captions.extend(texts)
        return plain(images, texts, columns)
    monkeypatch.setattr(common, "grid", grid)
    call(monkeypatch, train, *FLAGS, "--eval-every", 1, "--eval-n", 1, "--eval-unmask-steps", 1,
         "--out", "run")
    assert len(captions) == 24
    assert all(caption.partition(" | ")[0] in ("0", "1") for caption in captions)
