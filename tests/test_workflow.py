"""From training prompts to tables: prompts made for GenEval, rewards evaluated beside the one
trained on, guidance, a picture per file, a chat server, later work's settings, adapters."""
import http.server
import json
import re
import shutil
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, metrics, serving
from PIL import Image
from safetensors.torch import load_file

import common
import eval_geneval
import sample
import train
from checkpoint import read_rows
from model import BaseOf, InputError, load_showo
from reward import make_reward
from sample import mask_schedule, rollout, transition_log_prob

TINY = ("--model shapes --no-kl --steps 2 --prompts-per-step 6 --group-size 4 --unmask-steps 6 "
        "--eval-every 0 --eval-n 1 --sample-every 0 --save-every 0 --lr 1e-3").split()


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *map(str, flags)])
    train.main()


def parsed(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    return train.parse_args()


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
                                      "6800", "--seed", "3"])
    eval_geneval.main()
    examples = common.read_prompts(path)
    assert examples == eval_geneval.training_prompts(6800, 3) and len(examples) == 6800
    for number, example in enumerate(examples):
        eval_geneval.check_example(example, f"prompt {number}")
    official = {asked(example) for example in eval_geneval.geneval_prompts()}
    assert not official & {asked(example) for example in examples}

    counts = Counter(example["tag"] for example in examples)
    wanted = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert counts.keys() == wanted.keys()
    for tag, share in wanted.items():
        assert abs(counts[tag] - 400 * share) < 4 * (400 * share) ** 0.5


# ------------------------------------------------------------------------------ evaluation

def test_rewards_beside_the_one_trained_on_and_the_best(monkeypatch, tmp_path):
    out = tmp_path / "run"
    call(monkeypatch, "--out", out, "--eval-every", 1, "--eval-guidance", 0, 2,
         "--eval-reward", "geneval:partial,geneval:strict:2", "--best", "geneval:partial@2")
    rows = read_rows(out / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for name in ("overall", "exact", "counting", "geneval:partial", "geneval:strict"):
        assert 0 <= rows[0][name] <= 1 and f"{name}@2" in rows[0]
    assert rows[0]["overall@2"] > rows[0]["overall"] + 0.1      # guidance helps this base
    best = max(rows[1:], key=lambda row: (row["geneval:partial@2"], row["step"]))
    if rows[0]["geneval:partial@2"] > best["geneval:partial@2"]:
        assert not (out / "checkpoint-best").exists()       # the base, which is not saved again
    else:
        assert torch.load(out / "checkpoint-best/trainer.pt")["step"] == best["step"]
    assert not list(out.glob("*.replaced"))


def test_a_best_column_that_is_not_there_is_refused(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="--best beauty: no column of eval.jsonl; there are step"):
        call(monkeypatch, "--out", tmp_path / "run", "--eval-every", 1, "--best", "beauty")


def test_a_grid_of_prompts_without_metadata_has_no_scores(base, tmp_path):
    args = type("Args", (), dict(eval_unmask_steps=2, eval_guidance=[0.0], micro_batch=8,
                                 reward="geneval:exact"))
    train.picture_grid(tmp_path / "a/grid.png", [{"prompt": "a moon"}], args, *base, None)
    assert Image.open(tmp_path / "a/grid.png").width > 100


def test_one_detector_serves_all_parts(monkeypatch):
    made = []

    def detector(name, device="cpu", batch=8):
        made.append(name)
        return lambda images, examples: []
    monkeypatch.setattr("reward.load_detector", detector)
    args = type("Args", (), dict(model="somebody/else", reward="geneval:exact,geneval:partial:2",
                                 eval_reward="geneval:strict", reward_timeout=1.0,
                                 reward_patience=1.0))
    judges = train.load_judges(args, "cpu")
    assert len(made) == 1 and judges.detector is judges.others.detector is not None
    assert judges.names[4:] == ["geneval:strict"]


# ------------------------------------------------------------------------------ rollouts

def test_guidance_in_rollouts_leaves_log_probabilities_conditional(monkeypatch, tmp_path):
    call(monkeypatch, "--out", tmp_path / "run", "--guidance", 0.5, "--prompts-per-step", 12)
    call(monkeypatch, "--out", tmp_path / "plain", "--prompts-per-step", 12)
    guided, plain = metrics(tmp_path / "run"), metrics(tmp_path / "plain")
    assert guided[0]["ratio_mean"] == guided[0]["ratio_max"] == 1 and guided[0]["grad_norm"] > 0
    assert guided[0]["reward_mean"] != plain[0]["reward_mean"]


def test_random_order_is_uniform_and_eq_15_its_probability():
    """Frequencies of the next states of one move against Eq. 15, up to the number of orders."""
    torch.manual_seed(0)
    N, K, n, T = 4, 2, 60_000, 2
    logits = torch.randn(1, N, K)
    traj = rollout(lambda codes: logits.expand(len(codes), N, K), n, N, K, T, confidence="random",
                   generator=torch.Generator().manual_seed(0))
    n_moved = N - mask_schedule(N, T)[0].item()
    logp = transition_log_prob(logits.expand(n, N, K), traj.codes, traj.order, 0, "p2")
    orders = {3: 4, 2: 6, 1: 4}[n_moved]
    states, index, counts = traj.state(1, K).unique(dim=0, return_inverse=True, return_counts=True)
    expected = torch.zeros(len(states)).scatter(0, index, logp.exp()) / orders * n
    assert expected.sum().item() == pytest.approx(n, rel=1e-3)
    chi_square = ((counts - expected).square() / expected).sum()
    dof = len(states) - 1
    assert chi_square < dof + 4 * (2 * dof) ** 0.5
    with pytest.raises(ValueError, match="confidence 'luck'"):
        rollout(lambda codes: logits, 1, N, K, T, confidence="luck", generator=torch.Generator())


def test_p1_wants_confidence_and_no_guidance(monkeypatch, capsys):
    for flags in (("--guidance", 1), ("--confidence", "random")):
        with pytest.raises(SystemExit) as stopped:
            parsed(monkeypatch, "--model", "shapes", "--transition", "p1", *flags)
        assert stopped.value.code == 2 and "take p2" in capsys.readouterr().err


# ------------------------------------------------------------------------------ later work

def test_the_recipe_of_udm_grpo(monkeypatch, tmp_path):
    args = parsed(monkeypatch, "--recipe", "udm")
    assert (args.trajectory, args.ratio, args.loss_steps, args.loss_steps_from) == (
        "forward", "mean", 3, "early")
    assert (args.lr, args.lr_schedule, args.kl, args.kl_beta) == (1e-6, "constant", True, 0.05)
    starts = {tuple(train.loss_iterations(step, args)) for step in range(50)}
    assert starts == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    assert train.learning_rate(999, args) == 1e-6
    call(monkeypatch, "--out", tmp_path / "run", "--recipe", "udm", "--kl", "--unmask-steps", 10)
    rows = metrics(tmp_path / "run")
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-7) and rows[1]["kl_ref"] > 0


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
        monkeypatch.setattr(common, "get_rank", lambda: rank)
        monkeypatch.setattr(common, "get_world", lambda: world)
        monkeypatch.setattr(sys, "argv", ["sample.py", "--model", "shapes", "--prompts",
                                          str(prompts), "--n", "2", "--steps", "3", "--out",
                                          str(out)])
        sample.main()
        return capsys.readouterr().out.splitlines()[-1]

    assert draw(tmp_path / "one").startswith("process 0: drew 6 pictures")
    files = sorted((tmp_path / "one").glob("*.png"))
    assert [f.name for f in files] == [f"00000{i}-0{k}.png" for i in range(3) for k in range(2)]
    assert "drew 4" in draw(tmp_path / "two", 0, 2) and "drew 2" in draw(tmp_path / "two", 1, 2)
    for file in files:
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    whole = files[3].read_bytes()
    files[3].write_bytes(whole[:50])
    assert "drew 1" in draw(tmp_path / "one") and files[3].read_bytes() == whole
    assert "drew 0" in draw(tmp_path / "one")
    prompts.write_text("a photo of a star\n")
    with pytest.raises(InputError, match="was drawn with other settings"):
        draw(tmp_path / "one")


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
    assert values.tolist() == [9, 4, 6] * 10 and list(reward.log) == ["vlm:judge-7b"]
    path, body = chat.seen[0]
    assert path == "/v1/chat/completions" and body["model"] == "judge-7b"
    image = body["messages"][0]["content"][0]["image_url"]["url"]
    assert re.match("data:image/png;base64,iVBOR", image)
    lenient = make_reward(f"vlm:{chat.url}:judge-7b", finite=False)
    values = lenient(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), ["mute", "far", "good"])
    assert values.isnan().tolist() == [True, True, False]
    with pytest.raises(InputError, match="picture of 'mute' is nan"):
        make_reward(f"vlm:{chat.url}:judge-7b")(torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
                                                ["mute"])
    with pytest.raises(InputError, match="wanted vlm:URL:MODEL"):
        make_reward("vlm:127.0.0.1:judge")


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
    assert rows[0]["kl_ref"] == 0 and rows[-1]["kl_ref"] > 0

    shutil.copytree(tmp_path / "run", tmp_path / "other")
    path = tmp_path / "other/checkpoint-4/trainer.pt"
    torch.save(torch.load(path) | {"lora": {}}, path)
    with pytest.raises(InputError, match="the adapters in trainer.pt do not fit"):
        call(monkeypatch, "--kl", *LORA, "--resume", path.parent)
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    call(monkeypatch, "--out", tmp_path / "run", "--kl", *LORA, "--resume")
    again = weights(tmp_path / "run/checkpoint-4")
    assert metrics(tmp_path / "run") == rows
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_policy_with_adapters_off_is_the_base():
    showo, plain = load_showo("shapes"), load_showo("shapes")
    showo.add_lora(2)
    for name, p in showo.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    codes = torch.full((2, showo.N), showo.K)
    prompt = showo.encode(["a photo of a moon", "a photo of two stars"])
    with torch.no_grad():
        off, on, base = (m.logits(codes, prompt) for m in (BaseOf(showo), showo, plain))
        merged = load_showo("shapes")
        merged.load_state_dict(showo.merged_state())
        torch.testing.assert_close(merged.logits(codes, prompt), on, atol=1e-4, rtol=1e-4)
    assert torch.equal(off, base) and not torch.allclose(on, base, atol=1e-2)
