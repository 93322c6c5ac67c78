"""CLIPs of other makers: loaded whole, fed as they were trained."""
import numpy as np
import pytest
import torch
from helpers import CLOSE, DATA, tiny_clip
from PIL import Image
from rehearsal import save_tiny_clip, tiny_clip_model
from safetensors.torch import load_file

from reward import make_reward
from support import pictures
from support import weights as disk
from support.clip import load_clip, prepare
from support.weights import library

open_clip = library("open_clip")

PICTURES = torch.randint(0, 256, (3, 3, 40, 28), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog in the snow", ""]


def test_a_clip_has_the_activation_that_its_tag_was_trained_with(tmp_path, monkeypatch):
    _, path = tiny_clip(tmp_path)
    plain = make_reward(f"clip:tiny/{path}")(PICTURES, PROMPTS)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"quick_gelu": True})
    part = make_reward(f"clip:tiny/{path}")
    names = {type(module).__name__ for module in part.parts[0][2].model.modules()}
    assert "QuickGELU" in names and (part(PICTURES, PROMPTS) - plain).abs().max() > 1e-5


def test_a_clip_is_fed_as_its_own_config_says(tmp_path):
    save_tiny_clip(tmp_path)
    plain = make_reward(f"clip:{tmp_path}")(PICTURES, PROMPTS)
    config = disk.read_json(tmp_path / "open_clip_config.json")
    config["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    disk.write_json(tmp_path / "open_clip_config.json", config)
    model, transform, tokenizer = load_clip(str(tmp_path))
    pixels = torch.stack([transform(pictures.to_pil(image)) for image in PICTURES])
    assert -1 <= pixels.min() < pixels.max() <= 1
    with torch.no_grad():
        image, text, scale = model(pixels, tokenizer(PROMPTS))
    values = make_reward(f"clip:{tmp_path}")(PICTURES, PROMPTS)
    torch.testing.assert_close(values, (scale * image @ text.T).diagonal(), **CLOSE)
    assert (values - plain).abs().max() > 1e-3


def test_a_clip_of_open_clip_s_other_class(tmp_path):
    _, path = tiny_clip(tmp_path, custom_text=True, init_logit_bias=-10.0)
    part = make_reward(f"clip:tiny/{path}")
    model = part.parts[0][2].model
    assert type(model).__name__ == "CustomTextCLIP"
    pixels, tokens = part.parts[0][2].pixels(PICTURES), part.parts[0][2].tokenizer(PROMPTS)
    with torch.no_grad():
        wanted = model.get_logits(pixels, tokens)[0].diagonal()
    torch.testing.assert_close(part(PICTURES, PROMPTS), wanted, **CLOSE)


def test_a_clip_of_transformers_form_is_scored(tmp_path):
    torch.manual_seed(0)
    tiny_clip_model(vocab_size=49408, max_position_embeddings=77, eos_token_id=49407
                    ).save_pretrained(tmp_path)
    pick = make_reward(f"pickscore:{tmp_path}")(PICTURES, PROMPTS)
    torch.testing.assert_close(make_reward(f"clip:{tmp_path}")(PICTURES, PROMPTS), 26 * pick)


def test_clip_takes_a_folder_of_open_clip_s(tmp_path):
    save_tiny_clip(tmp_path)
    values = make_reward(f"clip:{tmp_path}:2")(PICTURES, PROMPTS)
    other = make_reward(f"clip:rehearsed/{tmp_path / 'weights.pt'}:2")(PICTURES, PROMPTS)
    torch.testing.assert_close(values, other)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(SystemExit, match="folder with open_clip_config.json and open_clip_model"):
        make_reward(f"clip:{tmp_path}")


@pytest.mark.parametrize("k", range(4))
def test_preprocessing_on_the_device_is_that_of_the_originals(k):
    expected = load_file(DATA / "preprocess/expected.safetensors")
    image = Image.open(DATA / f"preprocess/{k}.png").convert("RGB")
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    for fit, name in (("pad", "hpsv2"), ("crop", "imagereward")):
        ours = prepare(image, fit=fit)[0, :, ::7, ::7]
        torch.testing.assert_close(ours, expected[f"{k}.{name}"], atol=1e-5, rtol=0)
