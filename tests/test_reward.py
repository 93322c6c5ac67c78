"""reward.py: every reward against numbers of the original codes, sums, servers, wrong input."""
import base64
import http.server
import io
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from conftest import DATA, read_json, serving
from PIL import Image
from safetensors.torch import load_file

import reward as reward_module
import shapes
from checkpoint import InputError
from reward import (
    HttpReward,
    ImageReward,
    Reward,
    clip_cosine,
    clip_logits,
    main,
    make_reward,
    pickscore,
    prepare,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


# --------------------------------------------------------------------------------- CLIP's family

@pytest.fixture(scope="module")
def clip():
    return read_json("clip_tiny/config.json"), load_file(DATA / "clip_tiny/tensors.safetensors")


@pytest.fixture
def tiny(tmp_path, clip):
    """An architecture of open_clip's, and a file of weights as HPSv2 packs them."""
    config = clip[0]["open_clip"]
    text = config["text_cfg"] | {"vocab_size": 49408}
    (tmp_path / "tiny.json").write_text(json.dumps(config | {"text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "tiny.pt")
    return model.eval(), tmp_path / "tiny.pt"


def tiny_clip_model(config, text=None):
    """transformers' CLIPModel with the weights of the fixture; text: other sizes of its text."""
    from transformers import CLIPConfig, CLIPModel
    config = config["transformers"]
    config = config | {"text_config": config["text_config"] | (text or {})}
    model = CLIPModel(CLIPConfig(**config)).eval()
    if not text:
        weights = load_file(DATA / "clip_tiny/weights_transformers.safetensors")
        model.load_state_dict(weights, strict=False)
    return model


def picture(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_clip_and_hps_scores_are_those_of_the_originals(clip):
    config, tensors = clip
    model = open_clip.CLIP(**config["open_clip"]).eval()
    model.load_state_dict(load_file(DATA / "clip_tiny/weights_open_clip.safetensors"))
    inputs = model, tensors["pixel_values"], tensors["input_ids_zero_padded"]
    with torch.no_grad():
        logits = tensors["logits_per_image"].diagonal()
        torch.testing.assert_close(clip_logits(*inputs), logits, **CLOSE)
        torch.testing.assert_close(clip_cosine(*inputs), tensors["hps"], **CLOSE)


@pytest.mark.parametrize("padding", ["zero", "end"])
def test_pickscore_is_that_of_the_original(clip, padding):
    config, tensors = clip
    tokens = tensors[f"input_ids_{padding}_padded"]
    with torch.no_grad():
        values = pickscore(tiny_clip_model(config), tensors["pixel_values"], tokens)
    torch.testing.assert_close(values, tensors["pickscore_flow"], **CLOSE)


def test_clip_and_hps_end_to_end(tiny, monkeypatch):
    model, file = tiny
    monkeypatch.setattr(reward_module, "HPS_ARCHITECTURE", "tiny")
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    prompts = ["a cat", "a dog in the snow", ""]
    reward = make_reward(f"clip:tiny/{file}:2,hpsv2:{file}:-1")
    values = reward(images, prompts)
    with torch.no_grad():
        image, text, scale = model(prepare(images, 28), open_clip.get_tokenizer("tiny")(prompts))
    cosine = (image @ text.T).diagonal()
    torch.testing.assert_close(values, (2 * scale - 1) * cosine, **CLOSE)
    parts = {f"clip:tiny/{file}": scale * cosine, f"hpsv2:{file}": cosine}
    torch.testing.assert_close(reward.log, parts, **CLOSE)


def test_pickscore_end_to_end(clip, tmp_path):
    torch.manual_seed(0)
    model = tiny_clip_model(clip[0], {"vocab_size": 49408, "max_position_embeddings": 77,
                                      "eos_token_id": 49407})
    model.save_pretrained(tmp_path)
    size = model.config.vision_config.image_size
    images = torch.randint(0, 256, (3, 3, 40, size), dtype=torch.uint8)
    prompts = ["a cat", "a dog in the snow", ""]
    with torch.no_grad():
        tokens = open_clip.get_tokenizer("ViT-H-14")(prompts)
        expected = pickscore(model, prepare(images, size), tokens)
    values = make_reward(f"pickscore:{tmp_path}")(images, prompts)
    torch.testing.assert_close(values, expected, **CLOSE)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="1 weights missing, e.g. visual_projection.weight"):
        make_reward(f"pickscore:{tmp_path}")


def test_half_precision_as_on_a_gpu(tiny, clip, monkeypatch):
    """Models in half but for their scale, pictures in half, scores in float32, near float32's."""
    _, file = tiny
    monkeypatch.setattr(reward_module, "HPS_ARCHITECTURE", "tiny")
    images = torch.randint(0, 256, (3, 3, 40, 28), dtype=torch.uint8)
    prompts = ["a cat", "a dog in the snow", ""]
    for spec in (f"clip:tiny/{file}", f"hpsv2:{file}"):
        exact, half = make_reward(spec), make_reward(spec)
        model = half.parts[0][2].model.half()
        model.logit_scale.data = model.logit_scale.data.float()
        expected = exact(images, prompts)
        difference = (half(images, prompts) - expected).abs().max()
        assert 0 < difference < 5e-3 * expected.abs().max().clamp(min=1)
    config, tensors = clip
    model = tiny_clip_model(config)
    scale = model.logit_scale.data.clone()
    model.half().logit_scale.data = scale
    with torch.no_grad():
        values = pickscore(model, tensors["pixel_values"].half(), tensors["input_ids_zero_padded"])
    assert values.dtype == torch.float32
    assert (values - tensors["pickscore_flow"]).abs().max() < 5e-3


@pytest.mark.parametrize("k", range(4))
def test_preprocessing_on_the_device_is_that_of_the_originals(k):
    expected = load_file(DATA / "preprocess/expected.safetensors")
    image = picture(DATA / f"preprocess/{k}.png")[None]
    for fit, name in (("pad", "hpsv2"), ("crop", "imagereward")):
        ours = prepare(image, fit=fit)[0, :, ::7, ::7]
        torch.testing.assert_close(ours, expected[f"{k}.{name}"], atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------- ImageReward

@pytest.fixture(scope="module")
def imagereward(tmp_path_factory):
    return tiny_imagereward(tmp_path_factory.mktemp("vocab"))


def tiny_imagereward(folder):
    """Return ImageReward with the weights of the fixture, and what the original said."""
    from transformers import BertTokenizer
    facts = read_json("imagereward_tiny/cases.json")
    config, med = facts["config"], facts["config"]["med_config"]
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(facts["vocab"]) + "\n")
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
              "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "max_position_embeddings")
    text = {k: med[k] for k in names} | {"encoder_hidden_size": config["vision_width"]}
    model = ImageReward(BertTokenizer(str(vocab)), vision, text).eval()
    weights = load_file(DATA / "imagereward_tiny/weights.safetensors")
    model.load_state_dict(ImageReward.from_official(weights))
    return model, facts


def test_imagereward_is_that_of_the_original(imagereward):
    model, facts = imagereward
    for case in facts["cases"]:
        image = Image.open(DATA / "imagereward_tiny/images" / case["image"])
        if image.mode == "RGBA":
            # the original resizes with alpha, then drops it; pictures of a model have none
            image = image.resize((64, 64), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        with torch.no_grad():
            value = model(pixels[None], [case["prompt"]])[0].item()
        assert value == pytest.approx(case["reward"], rel=1e-4), case["image"]


def test_imagereward_at_full_size_takes_every_official_weight():
    names = read_json("imagereward_tiny/imagereward_to_transformers_blip.json")
    with torch.device("meta"):
        ours = set(ImageReward().state_dict())
    theirs = {name for name in names.values() if name}
    assert theirs == ours == set(ImageReward.from_official(dict.fromkeys(names)))


# --------------------------------------------------------------------------------------- servers

class Judge(http.server.BaseHTTPRequestHandler):
    """Answers what the test put into the server's list: a status and a body.

    The default scores are a prompt's length and a hundredth of the picture's width."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        status, answer = self.server.answers.pop(0) if self.server.answers else (200, None)
        if answer is None:
            scores = []
            for prompt, image in zip(body["prompts"], body["images"], strict=True):
                width, _ = Image.open(io.BytesIO(base64.b64decode(image))).size
                scores.append(len(prompt) + width / 100)
            answer = json.dumps({"scores": scores})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with serving(Judge) as server:
        server.seen, server.answers = [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server


def test_a_server_judges(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    images = torch.zeros(40, 3, 20, 20, dtype=torch.uint8)
    prompts = ["x" * (i % 7 + 1) for i in range(40)]
    wanted = torch.tensor([len(prompt) + 0.2 for prompt in prompts])
    torch.testing.assert_close(make_reward(f"http:{server.url}")(images, prompts), wanted)
    assert [len(body["images"]) for body in server.seen] == [32, 8]
    assert server.seen[0]["metadata"] is None
    server.answers += [(503, "busy"), (200, None), (200, None)]                 # tried again
    half = make_reward(f"http:{server.url}/score:0.5")(images, prompts)
    torch.testing.assert_close(half, wanted / 2)


@pytest.mark.parametrize("answers, message", [
    ([(200, '{"scores": [1]}')], "1 scores for 2"),
    ([(200, "hello")], "its answer is not"),
    ([(200, "[]")], "its answer is not"),
    ([(404, "no")], "no scores .HTTP Error 404"),
    ([(500, "no")] * 3, "no scores .HTTP Error 500"),
    ([(200, '{"scores": {"0": 1, "1": 2}}')], "its answer is not"),
    ([(200, '{"scores": "12"}')], "its answer is not"),
    ([(200, '{"scores": [1, true]}')], "its answer is not"),
    ([(200, '{"scores": [1, ' + 401 * "9" + "]}")], "a number that no float can hold"),
    ([(200, '{"scores": [1, null]}')], "picture of 'second' is nan"),
    ([(200, '{"scores": [1, NaN]}')], "picture of 'second' is nan")])
def test_wrong_answers(server, monkeypatch, answers, message):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.answers = list(answers)
    images = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
    with pytest.raises(InputError, match=message):      # waits of 1, 2 seconds fit in its patience
        make_reward(f"http:{server.url}", patience=3.5)(images, ["first", "second"])
    assert len(server.seen) == len(answers)


def test_a_server_that_is_not_there():
    reward = HttpReward("http://127.0.0.1:9", patience=0.0)
    with pytest.raises(InputError, match="no scores .*--reward-patience"):
        reward(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["x"], None)


# --------------------------------------------------------------------------------- command lines

def test_scoring_pictures_that_are_there(server, tmp_path, monkeypatch, capsys):
    for i in range(4):
        folder = tmp_path / "images" / f"{i // 2:05d}/samples"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 * (i + 1), 10)).save(folder / f"{i % 2:04d}.png")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "ab"}\n{"prompt": "x", "reward_prompt": "abcd"}\n')

    def score(folder):
        monkeypatch.setattr("sys.argv", ["reward.py", "--reward", f"http:{server.url}",
                                         "--images", str(folder), "--prompts", str(prompts)])
        main()

    score(tmp_path / "images")
    lines = capsys.readouterr().out.splitlines()                        # 2.1, 2.2, 4.3, 4.4
    assert lines[0] == "4 pictures of 2 prompts"
    assert lines[-1].split() == ["sum", "3.2500", "+-", f"{2.2 / 2:.4f}"]
    for i in (2, 10):                                                   # by number, not by letter
        folder = tmp_path / "flat"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (10 * i, 10)).save(folder / f"{i}.png")
    score(folder)
    assert [len(body["prompts"]) for body in server.seen[-2:]] == [1, 1]
    assert server.seen[-1]["prompts"] == ["abcd"]
    (tmp_path / "images/extra.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        score(tmp_path / "images")
    assert "5 PNGs for 2 prompts" in capsys.readouterr().err


LINE = {"tag": "counting", "prompt": "a photo of two stars",
        "include": [{"class": "star", "count": 2}]}
PICTURES = torch.stack([
    shapes.paint({(0, i): ("star", "red") for i in range(n)} | extra, 0)
    for n, extra in ((2, {}), (3, {}), (1, {}), (2, {(3, 3): ("moon", "blue")}))])


def test_the_exact_detector_of_shapes_on_the_command_line(tmp_path, monkeypatch, capsys):
    for i, image in enumerate(PICTURES):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "p.jsonl").write_text(json.dumps(LINE))
    monkeypatch.setattr("sys.argv", ["reward.py", "--reward", "geneval:partial", "--images",
                                     str(tmp_path), "--prompts", str(tmp_path / "p.jsonl"),
                                     "--detector", "shapes"])
    main()
    assert capsys.readouterr().out.splitlines()[-1].split() == ["sum", "0.7500"]


# -------------------------------------------------------------------------------- GenEval, sums

@pytest.mark.parametrize("rule, wanted", [("exact", [1, 0, 0, 0]), ("strict", [1, 0, 0, 1]),
                                          ("partial", [1, 0.5, 0.5, 1])])
def test_geneval_rules(rule, wanted):
    reward = make_reward(f"geneval:{rule}", detector=shapes.detect)
    assert reward(PICTURES, ["x"] * 4, [LINE] * 4).tolist() == wanted
    assert reward.log["objects"].tolist() == [2, 3, 1, 3]
    assert reward.log["objects_asked"].tolist() == [2] * 4


def test_sums_log_each_part():
    reward = make_reward("geneval:exact:2,geneval:partial:0.5", detector=shapes.detect)
    assert reward(PICTURES, ["x"] * 4, [LINE] * 4).tolist() == [2.5, 0.25, 0.25, 0.5]
    assert reward.log["geneval:exact"].tolist() == [1, 0, 0, 0]
    assert reward.log["geneval:partial"].tolist() == [1, 0.5, 0.5, 1]
    reward = make_reward("geneval", detector=shapes.detect)
    assert reward(PICTURES, ["x"] * 4, [LINE] * 4).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("spec, message", [
    ("beauty", "'beauty' is not known"),
    ("", "not known"),
    ("geneval:fair", "exact, strict or partial"),
    ("geneval:exact:nan", "finite"),
    ("clip:NoSuchModel/none", "NoSuchModel"),
    ("clip:ViT-H-14", "wanted MODEL/PRETRAINED"),
    ("hpsv2:v3", "v2.0, v2.1 or a file"),
    ("hpsv2:2.1", "v2.0, v2.1 or a file"),
    ("imagereward:/no/file", "no such file"),
    ("http:localhost", "wanted http:URL"),
    ("http:http://host:x:0.5", "port or the weight")])
def test_bad_specifications(spec, message):
    with pytest.raises(InputError, match=message):
        make_reward(spec)


def test_bad_calls():
    reward = make_reward("geneval", detector=shapes.detect)
    with pytest.raises(InputError, match="metadata"):
        reward(PICTURES, ["x"] * 4)
    with pytest.raises(InputError, match="metadata"):
        reward(PICTURES, ["x"] * 4, [{"prompt": "x"}] * 4)
    for value in (math.nan, math.inf):
        def part(images, prompts, metadata, value=value):
            return torch.tensor([1.0, value]), {}

        with pytest.raises(InputError, match="--reward part: the score of a picture of 'b' is"):
            Reward([("part", 0.0, part)])(PICTURES[:2], ["a", "b"])
    with pytest.raises(ValueError, match="not as many"):
        Reward([])(PICTURES, ["x"] * 3)
