"""What people who do this job have and do: prompt lists, state_dicts and CLIPs of other makers,
folders of pictures, judges' answers, restarts, trackers. Never silently wrong."""
import errno
import fcntl
import http.server
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT, metrics, read_json, serving
from PIL import Image
from rehearsal import save_tiny_clip, tiny_clip_model
from safetensors.torch import load_file

import checkpoint
import common
import reward
import shapes
import train
from eval_geneval import load_clip
from grpo import group_advantages
from model import load_models, load_showo
from reward import find_pictures, make_reward
from sample import Trajectory, generate

FLAGS = ("--model shapes --no-kl --prompts-per-step 2 --group-size 4 --unmask-steps 2 --steps 2 "
         "--eval-every 0 --eval-n 1 --save-every 1 --lr 1e-3 --reward geneval:partial").split()


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, *map(str, flags)])
    train.main()


# ------------------------------------------------------------------------------ prompts

TABLE = 'Prompts,Category\n"a cat, asleep",Animals\n"a ""red"" dog\non grass",Colors\n'


@pytest.mark.parametrize("name, content, wanted", [
    # the list that the paper's authors released; HPSv2's; WISE's
    ("train.json", '[{"caption": "a cat"}, {"caption": "Käfer "}]', ["a cat", "Käfer"]),
    ("hps.json", '["a cat", "a dog"]', ["a cat", "a dog"]),
    ("wise.json", '[{"Prompt": "a cat", "Category": 3}]', ["a cat"]),
    ("parti.tsv", "Prompt\tCategory\tNote\na cat\tX\t\na dog\tY\tz\n", ["a cat", "a dog"]),
    ("quotes.tsv", 'Prompt\tX\n"G I" painted\ta\na "b\tc\n', ['"G I" painted', 'a "b']),
    ("draw.csv", TABLE, ["a cat, asleep", 'a "red" dog\non grass']),
    ("tiif.jsonl:long", '{"short": "a", "long": "b c"}\n', ["b c"]),
    ("wide.csv:Note", "Prompt,Note\na,b\n", ["b"]),
    ("text.jsonl", '"a cat"\n{"text": "a dog"}\n', ["a cat", "a dog"]),
    ("dos.TXT", "\ufeffa cat\r\n\r\n\u00a0a dog\u00a0\r\n", ["a cat", "a dog"])])
def test_prompt_files(tmp_path, name, content, wanted):
    (tmp_path / name.split(":")[0]).write_bytes(content.encode())
    examples = common.read_prompts(tmp_path / name)
    assert [example["prompt"] for example in examples] == wanted
    if name == "draw.csv":
        assert examples[0]["Category"] == "Animals"         # other columns stay


def test_prompts_that_are_cut_are_counted(monkeypatch, tmp_path, capsys):
    lines = ["a photo of a star"] * 3 + ["a photo of a star " * 26]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    call(monkeypatch, "--prompts", tmp_path / "p.txt", "--reward", "clip:shapes/clip", "--out",
         tmp_path / "run")
    assert "1 of 4 prompts are cut to 128 tokens" in capsys.readouterr().out


# ------------------------------------------------------------------------------ weights, pictures

@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "module"])
def test_state_dicts_of_other_trainers(tmp_path, prefix, key):
    state = load_file(ROOT / "shapes/pytorch_model.safetensors")
    renamed = {prefix + name: weight for name, weight in state.items()}
    torch.save({key: renamed, "epoch": 3, "lr": [1.0]} if key else renamed, tmp_path / "w.pth")
    showo = load_showo(tmp_path / "w.pth", like="shapes")
    assert all(torch.equal(weight, state[name]) for name, weight in showo.state_dict().items())


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "config": {"a": 1}}, tmp_path / "w.pth")
    with pytest.raises(SystemExit, match="w.pth: holds no weights, but epoch, config"):
        checkpoint.read_weights(tmp_path / "w.pth")


def test_a_folder_of_accelerate_has_the_model_s_own_config(tmp_path):
    shutil.copy(ROOT / "shapes/pytorch_model.safetensors", tmp_path / "model.safetensors")
    showo, _ = load_models("shapes", ckpt=tmp_path)
    assert showo.config == load_showo("shapes").config


def test_the_tokenizer_s_files_are_such_as_transformers_4_reads(tmp_path, base):
    base[0].save(tmp_path)
    for folder in (ROOT / "shapes", tmp_path):
        kind = checkpoint.read_json(folder / "tokenizer_config.json")["tokenizer_class"]
        assert kind == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("names, wanted", [
    (["a cat_000000.png", "a cat_000001.png", "a dog_000000.png", "a dog_000001.png"], "ccdd"),
    (["a cat.jpg", "a dog.JPEG"], "cd"), (["a cat/0.png", "a dog/0.png"], "cd"),
    (["00000/grid.png", "00000/samples/0.png", "00001/samples/0.png"], ".cd"),
    (["000000-00.png", "000000-01.png", "000001-00.png", "000001-01.png"], "ccdd"),
    (["42_0.png", "42_1.png", "43_0.png", "43_1.png"], "cdcd"),        # the seed comes first
    (["seed0-0.png", "seed0-1.png", "seed1-0.png", "seed1-1.png"], "cdcd"),
    (["00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png",
      "00001/samples/0001.png"], "ccdd"),
    (["s8.webp", "s9.webp", "s10.webp", "s11.webp"], "ccdd"),           # 10 follows 9
    ([".ipynb_checkpoints/0-checkpoint.png", "0.png", "1.png"], ".cd")])
def test_pictures_go_to_their_prompts(tmp_path, names, wanted):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    cats, dogs = find_pictures(tmp_path, ["a cat", "a dog"])
    for letter, found in (("c", cats), ("d", dogs)):
        assert sorted(p.relative_to(tmp_path).as_posix() for p in found) == sorted(
            name for name, which in zip(names, wanted, strict=True) if which == letter)


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert common.read_picture(tmp_path / "x.png").tolist() == [[[0, 100, 255]]] * 3


# ------------------------------------------------------------------------------ rewards

def tiny_clip(tmp_path, monkeypatch, **changes):
    """Write an open_clip architecture "tiny-user" and a file of weights; return the file."""
    config = read_json("clip_tiny/config.json")["open_clip"] | changes
    config["text_cfg"] = config["text_cfg"] | {"vocab_size": 49408}
    (tmp_path / "tiny-user.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-user.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-user").state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


PICTURES = torch.randint(0, 256, (3, 3, 40, 28), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog in the snow", ""]


def test_a_clip_has_the_activation_that_its_tag_was_trained_with(tmp_path, monkeypatch):
    path = tiny_clip(tmp_path, monkeypatch)
    plain = make_reward(f"clip:tiny-user/{path}")(PICTURES, PROMPTS)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"quick_gelu": True})
    part = make_reward(f"clip:tiny-user/{path}")
    names = {type(module).__name__ for module in part.parts[0][2].model.modules()}
    assert "QuickGELU" in names and (part(PICTURES, PROMPTS) - plain).abs().max() > 1e-5


def test_a_clip_is_fed_as_its_own_config_says(tmp_path):
    save_tiny_clip(tmp_path)
    plain = make_reward(f"clip:{tmp_path}")(PICTURES, PROMPTS)
    config = checkpoint.read_json(tmp_path / "open_clip_config.json")
    config["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    checkpoint.write_json(tmp_path / "open_clip_config.json", config)
    model, transform, tokenizer = load_clip(str(tmp_path))
    pixels = torch.stack([transform(common.to_pil(image)) for image in PICTURES])
    assert -1 <= pixels.min() < pixels.max() <= 1
    with torch.no_grad():
        image, text, scale = model(pixels, tokenizer(PROMPTS))
    values = make_reward(f"clip:{tmp_path}")(PICTURES, PROMPTS)
    torch.testing.assert_close(values, (scale * image @ text.T).diagonal(), rtol=1e-4, atol=1e-4)
    assert (values - plain).abs().max() > 1e-3


def test_a_clip_of_open_clip_s_other_class(tmp_path, monkeypatch):
    path = tiny_clip(tmp_path, monkeypatch, custom_text=True, init_logit_bias=-10.0)
    part = make_reward(f"clip:tiny-user/{path}")
    model = part.parts[0][2].model
    assert type(model).__name__ == "CustomTextCLIP"
    transform, tokens = part.parts[0][2].transform, part.parts[0][2].tokenizer(PROMPTS)
    pixels = torch.stack([transform(common.to_pil(image)) for image in PICTURES])
    with torch.no_grad():
        wanted = model.get_logits(pixels, tokens)[0].diagonal()
    torch.testing.assert_close(part(PICTURES, PROMPTS), wanted, rtol=1e-4, atol=1e-4)


def test_a_clip_of_transformers_form_is_scored(tmp_path):
    torch.manual_seed(0)
    tiny_clip_model(vocab_size=49408, max_position_embeddings=77, eos_token_id=49407
                    ).save_pretrained(tmp_path)
    pick = make_reward(f"pickscore:{tmp_path}")(PICTURES, PROMPTS)
    torch.testing.assert_close(make_reward(f"clip:{tmp_path}")(PICTURES, PROMPTS), 26 * pick)


def test_parts_are_normalised_in_their_groups_before_they_are_added():
    T = 2
    traj = Trajectory(torch.zeros(8, 4), torch.zeros(8, 4), torch.zeros(8, T), 5, [4, 2, 0])
    large, small = torch.randn(2, 4) * 30, torch.randn(2, 4)
    rewards, weights = {"reward": large + small, "l": large, "s": small}, {"l": 1.0, "s": 1.0}
    adv, sound = train.advantages(rewards, weights, traj)
    wanted = (group_advantages(large) + group_advantages(small)) / 2
    torch.testing.assert_close(adv, wanted.flatten())
    assert sound.all()
    # equal totals of different make-up
    rewards = {"l": torch.tensor([[1.0, 2, 3, 0]]), "s": torch.tensor([[2.0, 1, 0, 0]])}
    rewards["reward"] = rewards["l"] + rewards["s"]
    adv, _ = train.advantages(rewards, {"l": 2.0, "s": 1.0}, traj[:4])
    assert len({round(a, 4) for a in adv[:3].tolist()}) == 3
    # one part is Eq. 12, bit for bit; a part of weight 0, or without a score, changes nothing
    none = torch.full((2, 4), torch.nan)
    adv, _ = train.advantages({"reward": large, "l": large, "n": none}, {"l": 1.0, "n": 0.0}, traj)
    assert torch.equal(adv, group_advantages(large).flatten())


@pytest.mark.parametrize("said, score", [
    ("**Final Score**: 4", 4), ("Final score: 4", 4), ("Final Score (1-5): 4", 4),
    ("Final Score is 4", 4), ("Final Score：4", 4), ("FINAL SCORE: **3.5**/5", 3.5),
    ("Final Score, from 1 (worst) to 5 (best): 4", 4), ("Final Score (scale: 1-5): 2", 2),
    ("Final Score: 1. No! Final Score: 5.", 5), ("Final Score:\n4", 4), ("final score = 4 !", 4),
    ("Final Score: 4 out of 5", 4), ("Final Score (max: 5): 4", 4), ("Final Score: 3 to 4", None),
    ("Final Score: **4**/10", None), ("Final Score: 4 (out of 10)", None),
    ("Final Score: -1", None), ("Final Score: 4/10", None),
    ("Final Score: 4 out of 10", None), ("Final Score: 10", None), ("Final Score: four", None),
    ("Final Score: 3-4", None), ("4", None), ("", None), (None, None)])
def test_answers_of_judges(said, score):
    judge = reward.VlmReward("http://h/v1:phi")
    value = judge.read({"choices": [{"message": {"content": said}}]})
    assert value == score if score else np.isnan(value)


@pytest.mark.parametrize("spec, url, model, weight", [
    ("vlm:http://h:80/v1:phi:2.7:1", "http://h:80/v1/chat/completions", "phi:2.7", 1),
    ("vlm:http://h/v1:qwen2.5-vl", "http://h/v1/chat/completions", "qwen2.5-vl", 1)])
def test_names_and_keys_of_chat_servers(monkeypatch, spec, url, model, weight):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    (_, found, judge), = make_reward(spec).parts
    assert (judge.url, judge.model, found) == (url, model, weight)
    assert judge.headers["Authorization"] == "Bearer sk-1"
    assert "Authorization" not in make_reward("http:http://h/").parts[0][2].headers


def test_pictures_of_several_processes_go_to_their_prompts(tmp_path):
    for i in range(4):
        (tmp_path / f"rank{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"rank{i % 2}/{i}.png").touch()
    assert [found[0].name for found in find_pictures(tmp_path, list("wxyz"))] == [
        "0.png", "1.png", "2.png", "3.png"]


def test_pictures_whose_names_leave_a_prompt_out_are_refused(tmp_path):
    for name in ("a cat_0.png", "a-dog_0.png"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match="names begin with prompts, but not 1 with each"):
        find_pictures(tmp_path, ["a cat", "a/dog"])


def test_a_judge_without_a_model_is_refused():
    for spec in ("vlm:http://h:8000/v1", "vlm:localhost:8000/v1:m"):
        with pytest.raises(SystemExit, match="wanted vlm:http://HOST:PORT/v1:MODEL"):
            make_reward(spec)


def test_a_busy_server_is_asked_again(monkeypatch):
    class Busy(http.server.BaseHTTPRequestHandler):
        codes = [429, 408, 503]

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(self.codes.pop(0) if self.codes else 200)
            self.end_headers()
            self.wfile.write(b'{"scores": [2]}')

        def log_message(self, *args):
            pass
    monkeypatch.setattr(reward.time, "sleep", lambda seconds: None)
    with serving(Busy) as server:
        part = make_reward(f"http:http://127.0.0.1:{server.server_port}/")
        assert part(PICTURES[:1], ["x"]).tolist() == [2] and not Busy.codes


# ------------------------------------------------------------------------------ runs

def test_each_run_has_its_own_folder_with_its_seed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for seed in (42, 43):
        call(monkeypatch, "--steps", 1, "--save-every", 0, "--seed", seed)
    first, second = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert re.match(r"shapes-seed42-\d+-\d+-\d+$", first) and second.startswith("shapes-seed43-")


def test_wandb_goes_on_with_the_same_run(monkeypatch, tmp_path):
    begun, sent = [], []

    def init(**settings):
        begun.append(settings)
        return SimpleNamespace(id=settings["id"] or "x1", finish=lambda: None,
                               log=lambda values, step: sent.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(
        init=init, Image=lambda path: ("picture", path)))
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: name)
    run = tmp_path / "run"
    flags = ("--wandb", "project", "--eval-every", 2, "--eval-unmask-steps", 2, "--out", run)
    call(monkeypatch, *flags)
    shutil.rmtree(run / "checkpoint-2")     # as if it had ended before it saved
    before = list(sent)
    call(monkeypatch, *flags, "--resume", "--steps", 3)
    assert [settings["id"] for settings in begun] == [None, "x1"]
    assert begun[0]["dir"] == run and begun[0]["resume"] == "allow"
    assert [step for step, _ in before] == [0, 1, 2, 2]
    assert [step for step, _ in sent[len(before):]] == [3, 3]       # 2 is not sent again
    name, picture = next(values for step, values in sent if step == 0)["eval/grid"]
    assert name == "picture" and os.path.exists(picture)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_obstacle(monkeypatch, tmp_path, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", flock)
    call(monkeypatch, "--steps", 1, "--out", tmp_path / "run")
    assert capsys.readouterr().err.count("WARNING: ") == 1 and metrics(tmp_path / "run")


def test_micro_batches_bound_rollouts_and_evaluations_and_change_no_picture(base, monkeypatch):
    showo, magvit = base
    rows, plain = [], type(showo).logits

    def logits(self, codes, *args, **more):
        rows.append(len(codes))
        return plain(self, codes, *args, **more)
    monkeypatch.setattr(type(showo), "logits", logits)
    args = SimpleNamespace(group_size=6, micro_batch=6, unmask_steps=4, transition="p2")
    examples, trajs, pictures = shapes.prompts("train", 2), [], []
    for args.micro_batch in (12, 2):
        rows.clear()
        trajs.append(train.sample_groups(examples, [(0, i) for i in range(2)], args, showo))
        pictures.append(generate(showo, magvit, ["a photo of a star"], n=6, T=4, guidance=1.0,
                                 batch=args.micro_batch))
        assert max(rows) == (12 if args.micro_batch == 12 else 2)
    assert torch.equal(trajs[0].codes, trajs[1].codes)
    assert torch.equal(pictures[0], pictures[1])


def test_the_ratio_is_exactly_1_on_the_first_pass_in_bf16(monkeypatch, tmp_path):
    call(monkeypatch, "--dtype", "bf16", "--steps", 1, "--group-size", 8, "--out", tmp_path / "run")
    row, = metrics(tmp_path / "run")
    assert row["ratio_mean"] == row["ratio_max"] == 1 and row["grad_norm"] > 0


def test_the_preset_is_the_one_epoch_of_the_released_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    args = train.parse_args()
    assert args.steps * args.group_size * args.prompts_per_step * 8 == 625 * 96
    assert args.steps * args.prompts_per_step * 8 == 10_000         # prompts
    assert args.eval_every == 50 and args.eval_guidance == 5
    assert len(common.read_prompts(ROOT / "prompts/eval.txt")) == 12


def test_lora_checkpoints_have_no_names_of_adapters(monkeypatch, tmp_path):
    call(monkeypatch, "--lora", 2, "--out", tmp_path / "run")
    saved = load_file(tmp_path / "run/checkpoint-2/pytorch_model.safetensors")
    assert saved.keys() == load_file(ROOT / "shapes/pytorch_model.safetensors").keys()
    load_showo(tmp_path / "run/checkpoint-2")
