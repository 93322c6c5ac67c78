"""reward.py: every reward against numbers of the original codes, sums, servers, and what is said when the input is wrong."""
import base64
import http.server
import io
import json
import math
import threading

import numpy as np
import open_clip
import pytest
import torch
from conftest import DATA, read_json
from PIL import Image
from safetensors.torch import load_file

import reward as reward_module
import shapes
from model import InputError
from reward import HttpReward, ImageReward, Reward, clip_cosine, clip_logits, main, make_reward, pickscore, prepare

CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def clip():
    return read_json("clip_tiny/config.json"), load_file(DATA / "clip_tiny/tensors.safetensors")


@pytest.fixture
def tiny(tmp_path, clip):
    """An architecture of open_clip's, and a file of weights as HPSv2 packs them."""
    (tmp_path / "tiny.json").write_text(json.dumps(clip[0]["open_clip"] | {"text_cfg": clip[0]["open_clip"]["text_cfg"] | {"vocab_size": 49408}}))
    open_clip.add_model_config(tmp_path / "tiny.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "tiny.pt")
    return model.eval(), tmp_path / "tiny.pt"


def picture(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_clip_and_hps_scores_are_those_of_the_originals(clip):
    config, tensors = clip
    model = open_clip.CLIP(**config["open_clip"]).eval()
    model.load_state_dict(load_file(DATA / "clip_tiny/weights_open_clip.safetensors"))
    inputs = model, tensors["pixel_values"], tensors["input_ids_zero_padded"]
    with torch.no_grad():
        torch.testing.assert_close(clip_logits(*inputs), tensors["logits_per_image"].diagonal(), **CLOSE)
        torch.testing.assert_close(clip_cosine(*inputs), tensors["hps"], **CLOSE)


@pytest.mark.parametrize("padding", ["zero", "end"])
def test_pickscore_is_that_of_the_original(clip, padding):
    from transformers import CLIPConfig, CLIPModel
    config, tensors = clip
    model = CLIPModel(CLIPConfig(**config["transformers"])).eval()
    model.load_state_dict(load_file(DATA / "clip_tiny/weights_transformers.safetensors"), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(pickscore(model, tensors["pixel_values"], tensors[f"input_ids_{padding}_padded"]), tensors["pickscore_flow"], **CLOSE)


def test_clip_and_hps_end_to_end(tiny, monkeypatch):
    model, file = tiny
    monkeypatch.setattr(reward_module, "HPS_ARCHITECTURE", "tiny")
    images, prompts = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8), ["a cat", "a dog in the snow", ""]
    reward = make_reward(f"clip:tiny/{file}:2,hpsv2:{file}:-1", keep=False)
    values = reward(images, prompts)
    with torch.no_grad():
        image, text, scale = model(prepare(images, 28), open_clip.get_tokenizer("tiny")(prompts))
    cosine = (image @ text.T).diagonal()
    torch.testing.assert_close(values, (2 * scale - 1) * cosine, **CLOSE)
    torch.testing.assert_close(reward.log, {f"clip:tiny/{file}": scale * cosine, f"hpsv2:{file}": cosine}, **CLOSE)


def test_half_precision_as_on_a_gpu(tiny, clip, monkeypatch):
    """On a CPU: models in half but for their scale, pictures in half, scores in float32, near those of float32."""
    from transformers import CLIPConfig, CLIPModel
    _, file = tiny
    monkeypatch.setattr(reward_module, "HPS_ARCHITECTURE", "tiny")
    images, prompts = torch.randint(0, 256, (3, 3, 40, 28), dtype=torch.uint8), ["a cat", "a dog in the snow", ""]
    for spec in (f"clip:tiny/{file}", f"hpsv2:{file}"):
        exact, half = (make_reward(spec) for _ in range(2))
        model = half.parts[0][2].model.half()
        model.logit_scale.data = model.logit_scale.data.float()
        assert 0 < (half(images, prompts) - exact(images, prompts)).abs().max() < 5e-3 * exact(images, prompts).abs().max().clamp(min=1)
    config, tensors = clip
    model = CLIPModel(CLIPConfig(**config["transformers"])).eval()
    model.load_state_dict(load_file(DATA / "clip_tiny/weights_transformers.safetensors"), strict=False)
    scale = model.logit_scale.data.clone()
    model.half().logit_scale.data = scale
    with torch.no_grad():
        values = pickscore(model, tensors["pixel_values"].half(), tensors["input_ids_zero_padded"])
    assert values.dtype == torch.float32 and (values - tensors["pickscore_flow"]).abs().max() < 5e-3


@pytest.mark.parametrize("k", range(4))
def test_preprocessing_on_the_device_is_that_of_the_originals(k):
    expected, image = load_file(DATA / "preprocess/expected.safetensors"), picture(DATA / f"preprocess/{k}.png")[None]
    torch.testing.assert_close(prepare(image, fit="pad")[0, :, ::7, ::7], expected[f"{k}.hpsv2"], atol=1e-5, rtol=0)
    torch.testing.assert_close(prepare(image, fit="crop")[0, :, ::7, ::7], expected[f"{k}.imagereward"], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def imagereward(tmp_path_factory):
    from transformers import BertTokenizer
    facts = read_json("imagereward_tiny/cases.json")
    config, med = facts["config"], facts["config"]["med_config"]
    vocab = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    vocab.write_text("\n".join(facts["vocab"]) + "\n")
    model = ImageReward(BertTokenizer(str(vocab)), dict(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16),
        {k: med[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                             "max_position_embeddings")} | {"encoder_hidden_size": config["vision_width"]}).eval()
    model.load_state_dict(ImageReward.from_official(load_file(DATA / "imagereward_tiny/weights.safetensors")))
    return model, facts


def test_imagereward_is_that_of_the_original(imagereward):
    model, facts = imagereward
    for case in facts["cases"]:
        image = Image.open(DATA / "imagereward_tiny/images" / case["image"])
        if image.mode == "RGBA":  # the original resizes with alpha, then drops it; pictures of a model have none
            image = image.resize((64, 64), Image.Resampling.BICUBIC)
        with torch.no_grad():
            value = model(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None], [case["prompt"]])[0].item()
        assert value == pytest.approx(case["reward"], rel=1e-4), case["image"]


def test_imagereward_at_full_size_takes_every_official_weight():
    names = read_json("imagereward_tiny/imagereward_to_transformers_blip.json")
    with torch.device("meta"):
        ours = set(ImageReward().state_dict())
    assert {v for v in names.values() if v} == ours == set(ImageReward.from_official(dict.fromkeys(names)))


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers what the test put into the server's list: a status and a body; the default scores by prompt length and size."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        status, answer = self.server.answers.pop(0) if self.server.answers else (200, None)
        if answer is None:
            sizes = [Image.open(io.BytesIO(base64.b64decode(image))).size[0] for image in body["images"]]
            answer = json.dumps({"scores": [len(prompt) + size / 100 for prompt, size in zip(body["prompts"], sizes)]})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    judge = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    judge.seen, judge.answers, judge.url = [], [], f"http://127.0.0.1:{judge.server_port}"
    thread = threading.Thread(target=judge.serve_forever)
    thread.start()
    yield judge
    judge.shutdown()
    thread.join()
    judge.server_close()


def test_a_server_judges(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    images, prompts = torch.zeros(40, 3, 20, 20, dtype=torch.uint8), ["x" * (i % 7 + 1) for i in range(40)]
    wanted = torch.tensor([len(prompt) + 0.2 for prompt in prompts])
    torch.testing.assert_close(make_reward(f"http:{server.url}")(images, prompts), wanted)
    assert [len(body["images"]) for body in server.seen] == [32, 8] and server.seen[0]["metadata"] is None
    server.answers += [(503, "busy"), (200, None), (200, None)]                # tried again
    torch.testing.assert_close(make_reward(f"http:{server.url}/score:0.5")(images, prompts), wanted / 2)
    for answers, message in (([(200, '{"scores": [1]}')], "1 scores for 2"), ([(200, "hello")], "its answer is not"), ([(200, "[]")], "its answer is not"),
                             ([(404, "no")], "after 1 tries"), ([(500, "no")] * 3, "after 3 tries")):
        server.answers = list(answers)
        with pytest.raises(InputError, match=message):
            make_reward(f"http:{server.url}")(images[:2], prompts[:2])
    for broken in ("null", "NaN"):
        server.answers = [(200, f'{{"scores": [1, {broken}]}}')]
        with pytest.raises(InputError, match="picture of 'second' is nan"):
            make_reward(f"http:{server.url}")(images[:2], ["first", "second"])


def test_a_server_that_is_not_there():
    with pytest.raises(InputError, match="no scores after 2 tries"):
        HttpReward("http://127.0.0.1:9", tries=2, wait=0.0)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["x"], None)


def test_scoring_pictures_that_are_there(server, tmp_path, monkeypatch, capsys):
    for i in range(4):
        folder = tmp_path / "images" / f"{i // 2:05d}/samples"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 * (i + 1), 10)).save(folder / f"{i % 2:04d}.png")
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "x", "reward_prompt": "abcd"}\n')
    command = ["reward.py", "--reward", f"http:{server.url}", "--images", str(tmp_path / "images"), "--prompts", str(tmp_path / "p.jsonl")]
    monkeypatch.setattr("sys.argv", command)
    main()
    said = capsys.readouterr().out.splitlines()                              # 2.1, 2.2, 4.3, 4.4
    assert said[0] == "4 pictures of 2 prompts" and said[-1].split() == ["sum", "3.2500", "+-", f"{2.2 / 2:.4f}"]
    for i in (2, 10):                                                           # by number, not by letter
        folder = tmp_path / "flat"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (10 * i, 10)).save(folder / f"{i}.png")
    monkeypatch.setattr("sys.argv", command[:4] + [str(folder)] + command[5:])
    main()
    assert [len(body["prompts"]) for body in server.seen[-2:]] == [1, 1] and server.seen[-1]["prompts"] == ["abcd"]
    monkeypatch.setattr("sys.argv", command)
    (tmp_path / "images/extra.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        main()
    assert "5 PNGs for 2 prompts" in capsys.readouterr().err


LINE = {"tag": "counting", "prompt": "a photo of two stars", "include": [{"class": "star", "count": 2}]}
PICTURES = torch.stack([shapes.paint({(0, i): ("star", "red") for i in range(n)} | extra, 0)
                        for n, extra in ((2, {}), (3, {}), (1, {}), (2, {(3, 3): ("moon", "blue")}))])


@pytest.mark.parametrize("rule, wanted", [("exact", [1, 0, 0, 0]), ("strict", [1, 0, 0, 1]), ("partial", [1, 0.5, 0.5, 1])])
def test_geneval_rules(rule, wanted):
    reward = make_reward(f"geneval:{rule}", detector=shapes.detect)
    assert reward(PICTURES, ["x"] * 4, [LINE] * 4).tolist() == wanted
    assert reward.log["objects"].tolist() == [2, 3, 1, 3] and reward.log["objects_asked"].tolist() == [2] * 4


def test_sums_log_each_part():
    reward = make_reward("geneval:exact:2,geneval:partial:0.5", detector=shapes.detect)
    assert reward(PICTURES, ["x"] * 4, [LINE] * 4).tolist() == [2.5, 0.25, 0.25, 0.5]
    assert reward.log["geneval:exact"].tolist() == [1, 0, 0, 0] and reward.log["geneval:partial"].tolist() == [1, 0.5, 0.5, 1]
    assert make_reward("geneval", detector=shapes.detect)(PICTURES, ["x"] * 4, [LINE] * 4).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("spec, message", [("beauty", "'beauty' is not known"), ("geneval:fair", "exact, strict or partial"),
                                           ("", "not known"), ("clip:NoSuchModel/none", "NoSuchModel"),
                                           ("hpsv2:v3", "v2.0, v2.1 or a file"), ("http:localhost", "wanted http:URL"), ("imagereward:/no/file", "no such file"),
                                           ("clip:ViT-H-14", "wanted MODEL/PRETRAINED"), ("geneval:exact:nan", "finite"), ("hpsv2:2.1", "v2.0, v2.1 or a file"),
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
        with pytest.raises(InputError, match="--reward part: the score of a picture of 'b' is"):
            Reward([("part", 0.0, lambda *_: (torch.tensor([1.0, value]), {}))])(PICTURES[:2], ["a", "b"])
    with pytest.raises(ValueError, match="not as many"):
        Reward([])(PICTURES, ["x"] * 3)
