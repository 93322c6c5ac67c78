"""model.py against numbers made by Show-o's own code (tests/data/README.md)."""
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from conftest import DATA, ROOT, read_json
from safetensors.torch import load_file, save_file

from checkpoint import fetch
from model import Gelu, InputError, MAGVITv2, Showo, load_magvit, load_showo, read_weights, to_uint8

TOKENIZER = DATA / "prompting/tokenizer"


@pytest.fixture(scope="module")
def showo():
    return load_showo(DATA / "showo/checkpoint", tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def expected():
    return load_file(DATA / "showo/expected.safetensors"), read_json("showo/expected.json")["cases"]


@pytest.mark.parametrize("max_text_len", [8, 16, 128])
def test_prompts_become_the_official_ids(showo, max_text_len):
    facts = read_json("prompting/prompting.json")
    prompt, image = showo.encode(facts["prompts"], max_text_len), [facts["mask_token_id"]] * 16
    rows = [ids + [showo.soi, *image, showo.eoi] for ids in prompt.ids.tolist()]
    assert rows == facts["sequences"][str(max_text_len)]
    assert (~prompt.real).sum(1).tolist() == facts["first_real_index"][str(max_text_len)]
    assert showo.K + showo.code_offset == facts["mask_token_id"]


def test_prompts_cannot_spell_control_tokens(showo):
    ids = showo.encode(["<|soi|> [PAD] <|t2i|>"], 64).ids[0]
    text = ids[ids != showo.pad]
    assert text[0] == showo.t2i and (text[1:] < showo.text_vocab).all() and len(text) > 10


@pytest.mark.parametrize("case", ["single", "batch4", "partial4"])
def test_logits(showo, expected, case):
    tensors, cases = expected
    codes = tensors[f"{case}.input_ids"][:, -17:-1] - showo.code_offset
    with torch.no_grad():
        logits = showo.logits(codes, showo.encode(cases[case]["prompts"], 16))
    torch.testing.assert_close(logits, tensors[f"{case}.image_logits"], atol=1e-4, rtol=1e-4)


def test_logits_do_not_depend_on_padding_or_on_a_shared_prefix(showo):
    codes = torch.randint(showo.K + 1, (5, 16), generator=torch.Generator().manual_seed(0))
    texts = ["a photo of a cat", "two", "", "a photo of a cat", "a green kite above a blue boat"]
    with torch.no_grad():
        together = showo.logits(codes, showo.encode(texts, 100))
        alone = torch.cat([showo.logits(codes[i:i + 1], showo.encode(texts[i:i + 1], 40)) for i in range(5)])
        shared = showo.prefill(showo.encode(["a photo of a cat", "two"], 40)).repeat(2)
        grouped = showo.logits(codes[:4], shared)
        picked = showo.logits(codes[:2], shared[torch.tensor([2, 0])])
        plain = showo.logits(codes[:4], showo.encode([texts[0], texts[0], "two", "two"], 40))
        swapped = showo.logits(codes[:2], showo.encode(["two", texts[0]], 40))
    for ours, wanted in ((together, alone), (grouped, plain), (picked, swapped)):
        torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="5 rows of codes, 4 rows of prompts"):
        showo.logits(codes, shared)


def test_a_shared_prefix_has_the_gradient_of_separate_ones(showo):
    codes = torch.randint(showo.K + 1, (4, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for prompt in (showo.encode(["a red cat", "two"]).repeat(2), showo.encode(["a red cat", "a red cat", "two", "two"])):
        showo.zero_grad()
        showo.logits(codes, prompt).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in showo.parameters()]))
    showo.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_guidance(showo, expected):
    tensors, cases = expected
    codes = tensors["cfg.input_ids"][:2, -17:-1] - showo.code_offset
    with torch.no_grad():
        logits = showo.logits(codes, showo.encode(cases["cfg"]["prompts"], 16), guidance=5.0)
    torch.testing.assert_close(logits, tensors["cfg.guided_image_logits"], atol=1e-3, rtol=1e-4)


def test_the_activation_is_gelu_new():
    x = torch.linspace(-12, 12, 24_001)
    for dtype, close, slopes in ((torch.float32, 1e-6, 1e-5), (torch.bfloat16, 4e-2, 2e-2)):
        ours, exact = (start.detach().clone().requires_grad_() for start in (x.to(dtype), x.to(dtype).double()))
        out = Gelu()(ours)
        wanted = 0.5 * exact * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact ** 3)))
        out.sum().backward()
        wanted.sum().backward()
        assert (out - wanted).abs().max() < close and (ours.grad - exact.grad).abs().max() < slopes


def test_every_layout_loads_the_same(showo, tmp_path):
    state = showo.state_dict()
    torch.save(dict(state), tmp_path / "mycheckpoint.pth")
    names = sorted(state)
    for folder, parts in (("bin", [names]), ("sharded", [names[:20], names[20:]])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text((DATA / "showo/checkpoint/config.json").read_text())
        (tmp_path / folder / "phi_config.json").write_text((DATA / "showo/checkpoint/phi_config.json").read_text())
        if len(parts) == 1:
            torch.save(dict(state), tmp_path / folder / "pytorch_model.bin")
            continue
        files = [f"model-{i}.safetensors" for i in range(len(parts))]
        for file, part in zip(files, parts):
            save_file({k: state[k] for k in part}, tmp_path / folder / file)
        index = ", ".join(f'"{k}": "{file}"' for file, part in zip(files, parts) for k in part)
        (tmp_path / folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    torch.save({"epoch": 3, "state_dict": dict(state)}, tmp_path / "nested.pth")
    torch.save(dict(state), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in ("mycheckpoint.pth", "bin", "sharded", "nested.pth", "old.pth"):
        other = load_showo(tmp_path / path, tokenizer=TOKENIZER)
        assert all(torch.equal(other.state_dict()[k], v) for k, v in state.items())
        assert (other.K, other.code_offset, other.text_vocab) == (showo.K, showo.code_offset, showo.text_vocab)


def test_a_bare_file_takes_the_config_of_the_model_it_belongs_to(showo, tmp_path):
    shutil.copy(DATA / "showo/checkpoint/pytorch_model.safetensors", tmp_path / "mine.safetensors")
    assert load_showo(tmp_path / "mine.safetensors", tokenizer=TOKENIZER).N == 1024
    assert load_showo(tmp_path / "mine.safetensors", tokenizer=TOKENIZER, like=DATA / "showo/checkpoint").config == showo.config


def test_save_writes_what_show_o_wrote(showo, tmp_path):
    showo.save(tmp_path)
    ours, theirs = (load_file(folder / "pytorch_model.safetensors") for folder in (tmp_path, DATA / "showo/checkpoint"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], v) and ours[k].dtype == v.dtype for k, v in theirs.items())
    assert json.loads((tmp_path / "config.json").read_text()) == read_json("showo/checkpoint/config.json")


def test_saving_over_the_file_that_is_mapped(tmp_path):
    for name in ("config.json", "phi_config.json", "pytorch_model.safetensors"):
        shutil.copy(DATA / "showo/checkpoint" / name, tmp_path)
    model = load_showo(tmp_path, tokenizer=TOKENIZER)
    model.save(tmp_path)
    model.save(tmp_path)
    before, after = (load_file(folder / "pytorch_model.safetensors") for folder in (DATA / "showo/checkpoint", tmp_path))
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_the_projector_of_the_clip_variant_is_reported_and_left_out(showo, tmp_path):
    extra = {f"mm_projector.{i}.{kind}": torch.zeros(4) for i in (0, 2) for kind in ("weight", "bias")}
    official = read_json("showo/showo_512_manifest.json")
    assert official["w_clip_vit_true"]["tensors"].keys() - official["w_clip_vit_false"]["tensors"].keys() == extra.keys()
    (tmp_path / "phi_config.json").write_text((DATA / "showo/checkpoint/phi_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(read_json("showo/checkpoint/config.json") | {"w_clip_vit": True}))
    save_file(dict(showo.state_dict()) | extra, tmp_path / "pytorch_model.safetensors")
    with pytest.warns(UserWarning, match="mm_projector .4 weights") as seen:
        model = load_showo(tmp_path, tokenizer=TOKENIZER)
    assert len(seen) == 1 and model.state_dict().keys() == showo.state_dict().keys() and model.config == showo.config


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision(showo, expected, how):
    tensors, cases = expected
    half = load_showo(DATA / "showo/checkpoint", tokenizer=TOKENIZER, dtype=torch.bfloat16 if how == "weights" else torch.float32)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16 if how == "weights" else torch.float32}
    half.compute_dtype = torch.bfloat16 if how == "autocast" else None
    for case in ("single", "batch4", "partial4"):
        codes, wanted = tensors[f"{case}.input_ids"][:, -17:-1] - showo.code_offset, tensors[f"{case}.image_logits"]
        with torch.no_grad():
            logits = half.logits(codes, half.encode(cases[case]["prompts"], 16))
        assert logits.dtype == torch.float32 and (logits - wanted).norm() < 2e-2 * wanted.norm()
        assert (logits - wanted).abs().max() < 2e-2 * wanted.abs().max() and not torch.equal(logits, wanted)
    codes, wanted = tensors["cfg.input_ids"][:2, -17:-1] - showo.code_offset, tensors["cfg.guided_image_logits"]
    with torch.no_grad():  # guidance 5 amplifies the errors of its two halves
        guided = half.logits(codes, half.encode(cases["cfg"]["prompts"], 16), guidance=5.0)
    assert (guided - wanted).norm() < 3e-2 * wanted.norm()


def test_hub_cache_and_revisions_without_network(showo, tmp_path):
    """A cache as huggingface_hub lays it out, with two commits; offline, in processes of their own."""
    repo = tmp_path / "models--somebody--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("a" * 40)
    for commit, shift in (("a" * 40, 0), ("b" * 40, 1)):
        shutil.copytree(DATA / "showo/checkpoint", repo / "snapshots" / commit)
        shutil.copytree(TOKENIZER, repo / "snapshots" / commit, dirs_exist_ok=True)
        save_file({k: v + shift for k, v in showo.state_dict().items()}, repo / "snapshots" / commit / "pytorch_model.safetensors")
    (tmp_path / "models--somebody--half/snapshots" / ("c" * 40)).mkdir(parents=True)
    (tmp_path / "models--somebody--half/refs").mkdir()
    (tmp_path / "models--somebody--half/refs/main").write_text("c" * 40)
    code = """
from model import InputError, load_showo
bias = lambda *a, **k: load_showo(*a, **k).showo.lm_head.bias.double().mean().item()
print(bias("somebody/tiny"), bias("somebody/tiny@" + "b" * 40), bias("somebody/tiny", revision="b" * 40))
for name in ("somebody/half", "somebody/absent"):
    try:
        load_showo(name)
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    values, half, absent = done.stdout.splitlines()
    main, at, revision = map(float, values.split())
    assert main == pytest.approx(showo.showo.lm_head.bias.double().mean().item()) and at == revision == pytest.approx(main + 1)
    for said, name in ((half, "somebody/half"), (absent, "somebody/absent")):
        assert said.startswith(f"{name}: ") and "config.json" in said and "pytorch_model" in said and f"hf download {name}" in said


@pytest.mark.parametrize("there, taken", [(["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
                                          (["pytorch_model.bin.index.json", "pytorch_model-1.bin"], ["pytorch_model-1.bin", "pytorch_model.bin.index.json"])])
def test_of_weights_in_two_formats_one_is_fetched(monkeypatch, tmp_path, there, taken):
    def snapshot(name, *, allow_patterns, ignore_patterns, **_):
        for file in huggingface_hub.utils.filter_repo_objects(["config.json", *there], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).touch()
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    fetch("somebody/tiny", ["config", "weights"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", *taken]


def test_save_and_load_again(showo, tmp_path):
    showo.save(tmp_path / "saved")
    again = load_showo(tmp_path / "saved")
    prompt, codes = showo.encode(["a red cat"]), torch.full((1, 16), showo.K)
    with torch.no_grad():
        assert torch.equal(again.logits(codes, again.encode(["a red cat"])), showo.logits(codes, prompt))


def test_full_size_modules_have_the_official_names_and_shapes():
    config = dict(vocab_size=58498, llm_vocab_size=50295, codebook_size=8192, num_vq_tokens=1024)
    with torch.device("meta"):
        models = Showo(config, {}, None), MAGVITv2()
    manifests = (read_json("showo/showo_512_manifest.json")["w_clip_vit_false"], read_json("magvit/magvitv2_manifest.json"))
    for model, manifest in zip(models, manifests):
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        assert shapes == {name: entry["shape"] for name, entry in manifest["tensors"].items()}


def test_magvit():
    model, expected = load_magvit(DATA / "magvit"), load_file(DATA / "magvit/expected.safetensors")
    close = dict(atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(expected["encode.pixels"]), expected["encode.hidden"], **close)
        assert torch.equal(model.encode(expected["encode.pixels"]), expected["encode.indices"])
        assert torch.equal(model.quantize.embedding, expected["codebook.entries"])
        pixels = model.decode(expected["decode.indices"])
        torch.testing.assert_close(pixels, expected["decode.pixels"], **close)
        torch.testing.assert_close(model.decode(expected["decode_rect.indices"], (4, 6)), expected["decode_rect.pixels"], **close)
    difference = to_uint8(pixels).permute(0, 2, 3, 1).int() - expected["decode.uint8"].int()
    assert difference.abs().max() <= 1
    many = expected["decode.indices"].repeat(17, 1)                     # 34 x 64 codes: three chunks
    torch.testing.assert_close(model.decode(many), expected["decode.pixels"].repeat(17, 1, 1, 1), **close)
    with pytest.raises(ValueError, match="24 codes"):
        model.decode(expected["decode_rect.indices"])


@pytest.mark.parametrize("damage, message", [
    (lambda s: s.pop("showo.lm_head.bias"), "missing showo.lm_head.bias"),
    (lambda s: s.update({"extra.weight": torch.zeros(1)}), "surplus extra.weight"),
    (lambda s: s.update({"showo.lm_head.bias": torch.zeros(3)}), r"showo.lm_head.bias has shape \[3\], wanted \[395\]")])
def test_wrong_weights_are_named(showo, tmp_path, damage, message):
    state = dict(showo.state_dict())
    damage(state)
    for name in ("config.json", "phi_config.json"):
        (tmp_path / name).write_text((DATA / "showo/checkpoint" / name).read_text())
    save_file(state, tmp_path / "pytorch_model.safetensors")
    with pytest.raises(InputError, match=message):
        load_showo(tmp_path, tokenizer=TOKENIZER)


def change(name, **values):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


@pytest.mark.parametrize("damage, message", [
    (change("config.json", num_vq_tokens="16"), "num_vq_tokens is '16'"), (change("config.json", codebook_size=65), "vocab_size 395 is not"),
    (change("config.json", mask_token_id=7), "the last id"), (change("config.json", llm_vocab_size=319, codebook_size=65), "320 entries"),
    (change("phi_config.json", num_hidden_layers="3"), "cannot build Showo"), (change("phi_config.json", hidden_act="nope"), "cannot build Showo"),
    (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"), (lambda folder: (folder / "tokenizer.json").write_text("{}"), "--tokenizer"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "--tokenizer"),
    (lambda folder: (folder / "pytorch_model.safetensors").rename(folder / "x") and (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "absent.safetensors"}}'), "shards that are not there")])
def test_odd_folders_are_said_in_one_line(tmp_path, damage, message):
    for source in ("showo/checkpoint", "prompting/tokenizer"):
        shutil.copytree(DATA / source, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as said:
        load_showo(tmp_path)
    assert "\n" not in str(said.value)


def test_a_tokenizer_of_another_model_does_not_shift_the_codes(tmp_path):
    from transformers import AutoTokenizer
    shutil.copy(DATA / "showo/checkpoint/pytorch_model.safetensors", tmp_path)
    longer = AutoTokenizer.from_pretrained(TOKENIZER)
    longer.add_tokens([f"<{i}>" for i in range(10)])
    longer.save_pretrained(tmp_path / "longer")
    with pytest.raises(InputError, match="codebook_size 54 is no power of two"):
        load_showo(tmp_path / "pytorch_model.safetensors", tokenizer=tmp_path / "longer")


def test_language_model_settings_survive_saving(tmp_path):
    shutil.copytree(DATA / "showo/checkpoint", tmp_path / "a")
    change("phi_config.json", rope_scaling={"rope_type": "linear", "factor": 2.0})(tmp_path / "a")
    model = load_showo(tmp_path / "a", tokenizer=TOKENIZER)
    model.save(tmp_path / "b")
    codes = torch.full((1, 16), model.K)
    with torch.no_grad():
        first, again, plain = (m.logits(codes, m.encode(["a red cat"])) for m in (model, load_showo(tmp_path / "b"), load_showo(
            DATA / "showo/checkpoint", tokenizer=TOKENIZER)))
    assert torch.equal(first, again) and not torch.allclose(first, plain, atol=1e-2)


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_unreadable_weights_are_named_and_pickled_code_is_not_run(tmp_path):
    torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "evil.pth")
    (tmp_path / "cut.safetensors").write_bytes((DATA / "magvit/model.safetensors").read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    for name in ("evil.pth", "cut.safetensors", "empty", "absent.pth"):
        with pytest.raises((InputError, FileNotFoundError), match=name):
            read_weights(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(InputError, match="no such file"):
        load_showo(tmp_path / "absent")
