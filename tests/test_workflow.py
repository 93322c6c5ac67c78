"""From training prompts to tables: prompts made for GenEval, rewards evaluated beside the one
trained on, a picture per file, a chat server, adapters."""
import functools
import http.server
import json
import re
import shutil
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, metrics, serving
from safetensors.torch import load_file

import common
import eval_geneval
import sample
import shapes
import train
from checkpoint import read_rows
from model import load_showo
from reward import make_reward

TINY = ("--model shapes --no-kl --steps 2 --prompts-per-step 6 --group-size 4 --unmask-steps 6 "
        "--eval-every 0 --eval-n 1 --save-every 0 --lr 1e-3 --reward geneval:partial").split()


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *map(str, flags)])
    train.main()


# ------------------------------------------------------------------------------ prompts

def asked(example):
    """What a prompt asks: classes with counts and colours; of a position, the pair and the axis."""
    things = frozenset((c["class"], c["count"], c.get("color")) for c in example["include"])
    relations = [c["position"][0] for c in example["include"] if "position" in c]
    axis = {"left of": "x", "right of": "x", "above": "y", "below": "y"}
    return example["tag"], things, tuple(axis[r] for r in relations)


def test_training_prompts_are_geneval_s_and_none_of_the_553(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    monkeypatch.setattr(sys, "argv", ["eval_geneval.py", "--write-prompts", str(path), "--n",
                                      "6800"])
    eval_geneval.main()
    examples = common.read_prompts(path)
    assert examples == eval_geneval.training_prompts(6800) and len(examples) == 6800
    eval_geneval.check_metadata(examples, tiny=False)
    official = {asked(example) for example in eval_geneval.geneval_prompts()}
    assert not official & {asked(example) for example in examples}

    counts = Counter(example["tag"] for example in examples)
    wanted = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert counts.keys() == wanted.keys()
    for tag, share in wanted.items():
        assert abs(counts[tag] - 400 * share) < 4 * (400 * share) ** 0.5


# ------------------------------------------------------------------------------ evaluation

def test_rewards_beside_the_one_trained_on(monkeypatch, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(x) + "\n" for x in shapes.prompts("eval")[::3]))
    for guidance in (0, 2):
        call(monkeypatch, "--out", tmp_path / str(guidance), "--eval-every", 1, "--eval-guidance",
             guidance, "--eval-prompts", few, "--eval-reward",
             "geneval:official,geneval:partial:0,geneval:strict:0")
    plain, guided = (read_rows(tmp_path / f"{guidance}/eval.jsonl") for guidance in (0, 2))
    assert [row["step"] for row in plain] == [0, 1, 2]
    assert all(0 <= plain[0][name] <= 1 for name in ("overall", "counting", "geneval:strict"))
    assert plain[0]["overall"] == plain[0]["geneval:official"] >= plain[0]["geneval:strict"]
    assert guided[0]["overall"] > plain[0]["overall"] + 0.1     # guidance helps this base


def test_one_detector_serves_all_parts(monkeypatch):
    made = []

    class Mask2Former:
        def __init__(self, *args, **kwargs):
            made.append(1)
    monkeypatch.setattr(eval_geneval, "load_detector", functools.cache(Mask2Former))
    for spec in ("geneval:exact,geneval:partial:2", "geneval:strict"):
        make_reward(spec)
    assert len(made) == 1


# ------------------------------------------------------------------------------ the mean token

def test_the_kl_of_the_mean_token(monkeypatch, tmp_path):
    """With --ratio mean, k3 is of the mean token too: far smaller where many tokens move."""
    kl = {}
    for ratio in ("sum", "mean"):
        call(monkeypatch, "--out", tmp_path / ratio, "--kl", "--ratio", ratio, "--unmask-steps", 2)
        kl[ratio] = metrics(tmp_path / ratio)[1]["kl_ref"]
    assert 0 < kl["mean"] < kl["sum"] / 4


# ------------------------------------------------------------------------------ pictures

def test_a_picture_per_file_in_shards_that_go_on(monkeypatch, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a photo of a moon\na photo of two stars\na photo of a red ring\n")

    def draw(out, rank=0, world=1):
        monkeypatch.setattr(common, "setup", lambda _: (rank, world, torch.device("cpu")))
        monkeypatch.setattr(sys, "argv", ["sample.py", "--model", "shapes", "--prompts",
                                          str(prompts), "--n", "2", "--steps", "3", "--out",
                                          str(out)])
        sample.main()

    draw(tmp_path / "one")
    files = sorted((tmp_path / "one").glob("*.png"))
    assert [f.name for f in files] == [f"00000{i}-0{k}.png" for i in range(3) for k in range(2)]
    draw(tmp_path / "two", 0, 2)
    assert len(list((tmp_path / "two").glob("*.png"))) == 4     # of the first and third prompt
    draw(tmp_path / "two", 1, 2)
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    whole, kept = files[3].read_bytes(), files[0].stat().st_mtime_ns
    files[3].unlink()
    draw(tmp_path / "one")
    assert files[3].read_bytes() == whole and files[0].stat().st_mtime_ns == kept


# ------------------------------------------------------------------------------ a chat server

class Chat(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server: the answers by what the caption says."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        caption = body["messages"][0]["content"][1]["text"].split("Caption: ")[1]
        answer = json.dumps({"choices": [{"message": {"content": self.server.texts[caption]}}]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def chat():
    with serving(Chat) as server:
        server.seen = []
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield server


def test_a_chat_server_judges(chat):
    chat.texts = {"good": "Sharp. Final Score: 4.5", "bold": "**Final Score:** **2**",
                  "twice": "Final Score: 1 ... no. Final Score: 3", "mute": "I would rather not.",
                  "far": "Final Score: 17"}
    prompts = ["good", "bold", "twice"] * 10
    reward = make_reward(f"vlm:{chat.url}:judge-7b:2")
    values = reward(torch.zeros(30, 3, 8, 8, dtype=torch.uint8), prompts)
    assert values.tolist() == [9, 4, 6] * 10 and list(reward.scores) == [f"vlm:{chat.url}:judge-7b"]
    path, body = chat.seen[0]
    assert path == "/v1/chat/completions" and body["model"] == "judge-7b"
    image = body["messages"][0]["content"][0]["image_url"]["url"]
    assert re.match("data:image/png;base64,iVBOR", image)
    values = reward(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), ["mute", "far", "good"])
    assert values.isnan().tolist() == [True, True, False]


# ------------------------------------------------------------------------------ adapters

LORA = ("--lora", 4, "--lr", 1e-2, "--warmup", 0, "--steps", 4, "--save-every", 2)


def weights(folder):
    return load_file(folder / "pytorch_model.safetensors")


def test_adapters_are_merged_in_checkpoints_and_resume_exactly(monkeypatch, tmp_path):
    call(monkeypatch, "--out", tmp_path / "run", "--kl", *LORA)
    whole, base = weights(tmp_path / "run/checkpoint-4"), weights(ROOT / "shapes")
    assert whole.keys() == base.keys()
    moved = {name for name in base if not torch.equal(whole[name], base[name])}
    assert moved and all(re.search(r"(q_proj|k_proj|v_proj|dense|fc1|fc2)\.weight$", name)
                         for name in moved)
    rows = metrics(tmp_path / "run")
    assert abs(rows[0]["kl_ref"]) < 1e-9 and rows[-1]["kl_ref"] > 0

    shutil.rmtree(tmp_path / "run/checkpoint-4")
    call(monkeypatch, "--out", tmp_path / "run", "--kl", *LORA, "--resume")
    again = weights(tmp_path / "run/checkpoint-4")
    assert metrics(tmp_path / "run") == rows
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_policy_with_adapters_off_is_the_base():
    showo, plain = load_showo("shapes"), load_showo("shapes")
    showo.add_lora(2)
    assert set(showo.trainable()) == {name for name, _ in showo.named_parameters()
                                      if name.endswith(("lora_A", "lora_B"))}
    for name, p in showo.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    codes = torch.full((2, showo.N), showo.K)
    prompt = showo.encode(["a photo of a moon", "a photo of two stars"])
    with torch.no_grad():
        on, base = (model.logits(codes, prompt) for model in (showo, plain))
        with showo.frozen_base():
            off = showo.logits(codes, prompt)
        merged = load_showo("shapes")
        merged.load_state_dict(showo.merged_state())
        torch.testing.assert_close(merged.logits(codes, prompt), on, atol=1e-4, rtol=1e-4)
    assert torch.equal(off, base) and not torch.allclose(on, base, atol=1e-2)
