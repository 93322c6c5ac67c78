"""The mistakes that users make every week end in one plain line that says what to do, printed by
one process."""
import re
import shutil
import subprocess
import sys

import huggingface_hub.constants
import pytest
from helpers import ROOT, TINY, refused, weights, write_lines
from safetensors.torch import save_file

import eval_geneval
import sample
import train

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
    (train, "--resume nowhere/checkpoint-3", "^--resume: there is no checkpoint in nowhere/c"),
    (train, "--reward clip:0,hpsv2:0", "^--reward clip:0,hpsv2:0: all weights are 0"),
    (eval_geneval, "--write-prompts x", "is now: python prompts/make_geneval.py --train FILE"),
    (train, "--reward http:h:8000", "^--reward http: wanted http:http://HOST:PORT/"),
    (train, "--reward clip:shapes/clip,clip:shapes/clip:2", "a part is there twice$"),
    (train, "--out /proc/x", "^--out /proc/x: cannot be written to .*; choose a folder with --out"),
    (train, "--resume", "^--resume: give the run's folder, --out DIR, or --resume "),
    (train, "--device cuda:9", "^--device cuda:9: there is none "),
    (train, "--device tpu", "^--device tpu: there is none "),
    (train, "--wandb project", "^--wandb needs a package: pip install wandb$"),
    (train, "--zero", "^--zero shards over processes: start with torchrun "),
    (train, "--loss-steps 5", "^--loss-steps 5 is more than --unmask-steps 2$"),
    (train, "--group-sizes 3", "unrecognized arguments: --group-sizes 3$"),
    (train, "--steps many", "argument --steps: invalid int value: 'many'$"),
    (sample, "--model shapes", "^give --prompt TEXT, or --prompts FILE$"),
    (sample, "--model shapes --prompt x --ckpt absent", "^absent: no such file or folder here"),
    (sample, "--model shapes --prompts absent.txt", "^absent.txt: cannot be read"),
    (eval_geneval, "", "give --out, the folder to draw into, or --score-only"),
    (eval_geneval, "--model shapes --score-only /no/such", "/no/such: no pictures there")])
def test_a_mistake_ends_in_one_line(monkeypatch, tmp_path, script, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "plain.txt").write_text("a photo of a cat\n")
    (tmp_path / "table.xlsx").write_text("x")
    write_lines(tmp_path / "cow.jsonl", [COW])
    half = {k: w for k, w in weights(ROOT / "shapes").items() if "head.bias" not in k}
    save_file(half, "half.safetensors")
    shutil.copytree(ROOT / "tests/data/magvit", tmp_path / "other")
    there = sorted(tmp_path.iterdir())
    said = refused(script, *(TINY if script is train else ()), *flags.split())
    assert re.search(message, said), said
    assert script is not sample or sorted(tmp_path.iterdir()) == there      # nothing was begun


@pytest.mark.parametrize("start", [(), ("-m", "torch.distributed.run", "--standalone",
                                        "--nproc_per_node", "2")])
def test_as_a_user_starts_it_one_process_says_it(start, tmp_path):
    done = subprocess.run(
        [sys.executable, *start, ROOT / "train.py", *TINY, "--reward", "nonsense"],
        capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    said = [line for line in lines if "--reward: 'nonsense' is none of clip" in line]
    assert len(said) == 1
    assert start or lines[-1] == said[0]
    assert f'File "{ROOT}/train.py"' not in done.stderr         # no traceback of ours
