"""reward.py: CLIP against open_clip's own numbers, GenEval's rules, sums, and what is said when the input is wrong."""
import open_clip
import pytest
import torch
from conftest import DATA, read_json
from safetensors.torch import load_file

import shapes
from model import InputError
from reward import Reward, clip_logits, make_reward


def test_clip_logits_are_those_of_the_reference():
    config, tensors = read_json("clip_tiny/config.json")["open_clip"], load_file(DATA / "clip_tiny/tensors.safetensors")
    model = open_clip.CLIP(**config).eval()
    model.load_state_dict(load_file(DATA / "clip_tiny/weights_open_clip.safetensors"))
    with torch.no_grad():
        ours = clip_logits(model, tensors["pixel_values"], tensors["input_ids_zero_padded"])
    wanted = tensors["logits_per_image"]
    torch.testing.assert_close(ours, wanted.diagonal() if wanted.dim() == 2 else wanted, rtol=1e-4, atol=1e-4)


def test_clip_end_to_end_with_open_clip_s_preprocessing(tmp_path):
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("RN50", pretrained=None)
    torch.save(model.state_dict(), tmp_path / "rn50.pt")
    images, prompts = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8), ["a cat", "a dog in the snow"]
    values = make_reward(f"clip:RN50/{tmp_path / 'rn50.pt'}:2")(images, prompts)
    from PIL import Image
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in images])
        image, text, scale = model(pixels, open_clip.get_tokenizer("RN50")(prompts))
    torch.testing.assert_close(values, 2 * (scale * image @ text.T).diagonal(), rtol=1e-4, atol=1e-4)


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
                                           ("", "not known"), ("clip:NoSuchModel/none", "NoSuchModel"), ("geneval", "no detector")])
def test_bad_specifications(spec, message):
    with pytest.raises(InputError, match=message):
        make_reward(spec)


def test_bad_calls():
    reward = make_reward("geneval", detector=shapes.detect)
    with pytest.raises(InputError, match="metadata"):
        reward(PICTURES, ["x"] * 4)
    with pytest.raises(InputError, match="metadata"):
        reward(PICTURES, ["x"] * 4, [{"prompt": "x"}] * 4)
    with pytest.raises(ValueError, match="not as many"):
        Reward([])(PICTURES, ["x"] * 3)
