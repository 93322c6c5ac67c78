"""Files of weights: all their layouts, the hub's folders, and what is refused."""
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import CHECKPOINT, ROOT, TOKENIZER, copy_configs, equal, weights
from safetensors.torch import save_file

from model import load_models, load_showo
from support.run import load_trainer
from support.weights import fetch, read_weights


def write_layouts(state, folder):
    """Write a state_dict in every layout that is read; return their paths."""
    torch.save(dict(state), folder / "mycheckpoint.pth")
    torch.save({"epoch": 3, "state_dict": dict(state)}, folder / "nested.pth")
    torch.save(dict(state), folder / "old.pth", _use_new_zipfile_serialization=False)

    copy_configs(folder / "bin")
    torch.save(dict(state), folder / "bin/pytorch_model.bin")

    copy_configs(folder / "sharded")
    names = sorted(state)
    shards = {"model-0.safetensors": names[:20], "model-1.safetensors": names[20:]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / "sharded" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / name for name in ("mycheckpoint.pth", "bin", "sharded", "nested.pth",
                                       "old.pth")]


def test_every_layout_loads_the_same(showo, tmp_path):
    state = showo.state_dict()
    copy_configs(tmp_path)              # beside the bare files
    for path in write_layouts(state, tmp_path):
        other = load_showo(path, tokenizer=TOKENIZER)
        assert equal(other.state_dict(), state)
        assert (other.K, other.code_offset) == (showo.K, showo.code_offset)
        assert other.text_vocab == showo.text_vocab


def test_a_bare_file_takes_the_config_of_the_model_it_belongs_to(showo, tmp_path):
    mine = tmp_path / "mine.safetensors"
    shutil.copy(CHECKPOINT / "pytorch_model.safetensors", mine)
    assert load_showo(mine, tokenizer=TOKENIZER, like=CHECKPOINT).config == showo.config


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "module"])
def test_state_dicts_of_other_trainers(tmp_path, prefix, key):
    state = weights(ROOT / "shapes")
    renamed = {prefix + name: weight for name, weight in state.items()}
    torch.save({key: renamed, "epoch": 3, "lr": [1.0]} if key else renamed, tmp_path / "w.pth")
    assert equal(load_showo(tmp_path / "w.pth", like="shapes").state_dict(), state)


def test_a_folder_of_accelerate_has_the_model_s_own_config(tmp_path):
    shutil.copy(ROOT / "shapes/pytorch_model.safetensors", tmp_path / "model.safetensors")
    showo, _ = load_models("shapes", ckpt=tmp_path)
    assert showo.config == load_showo("shapes").config


def test_saving_over_the_file_that_is_mapped(tmp_path):
    copy_configs(tmp_path)
    shutil.copy(CHECKPOINT / "pytorch_model.safetensors", tmp_path)
    model = load_showo(tmp_path, tokenizer=TOKENIZER)
    model.save(tmp_path)
    model.save(tmp_path)
    assert equal(weights(tmp_path), weights(CHECKPOINT))


def test_hub_cache_and_revisions_without_network(showo, monkeypatch, tmp_path):
    """A cache as huggingface_hub lays it out, with two commits; offline."""
    repo, half = tmp_path / "models--somebody--tiny", tmp_path / "models--somebody--half"
    for folder, commit in ((repo, "a" * 40), (half, "c" * 40)):
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(commit)
    (half / "snapshots" / ("c" * 40)).mkdir(parents=True)
    for commit, shift in (("a" * 40, 0), ("b" * 40, 1)):
        snapshot = repo / "snapshots" / commit
        shutil.copytree(CHECKPOINT, snapshot)
        shutil.copytree(TOKENIZER, snapshot, dirs_exist_ok=True)
        state = {name: weight + shift for name, weight in showo.state_dict().items()}
        save_file(state, snapshot / "pytorch_model.safetensors")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, shift in (("somebody/tiny", 0), ("somebody/tiny@" + "b" * 40, 1)):
        wanted = showo.showo.lm_head.bias.double().mean().item() + shift
        assert load_showo(name).showo.lm_head.bias.double().mean().item() == pytest.approx(wanted)
    for name in ("somebody/half", "somebody/absent", "somebody/absent@v2"):
        with pytest.raises(SystemExit) as end:
            load_showo(name)
        said = str(end.value)
        assert said.endswith(f"hf download {name.split('@')[0]}") or "somebody--half" in said
        assert "no weights there" in said or f"{name}: no " in said


@pytest.mark.parametrize("there, taken", [
    (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
    (["pytorch_model.bin.index.json", "pytorch_model-1.bin"],
     ["pytorch_model-1.bin", "pytorch_model.bin.index.json"])])
def test_of_weights_in_two_formats_one_is_fetched(monkeypatch, tmp_path, there, taken):
    def snapshot(name, *, allow_patterns, ignore_patterns, **_):
        for file in huggingface_hub.utils.filter_repo_objects(
                ["config.json", *there], allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns):
            (tmp_path / file).touch()
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    fetch("somebody/tiny")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", *taken]


@pytest.mark.parametrize("damage", [
    lambda s: s.pop("showo.lm_head.bias"), lambda s: s.update({"extra.weight": torch.zeros(1)}),
    lambda s: s.update({"showo.lm_head.bias": torch.zeros(3)})])
def test_wrong_weights_are_named(showo, tmp_path, damage):
    state = dict(showo.state_dict())
    damage(state)
    copy_configs(tmp_path)
    save_file(state, tmp_path / "pytorch_model.safetensors")
    with pytest.raises(SystemExit, match=f"^{tmp_path}: 1 weights do not fit Showo, such as "
                       "(showo.lm_head.bias|extra.weight); is it the right checkpoint"):
        load_showo(tmp_path, tokenizer=TOKENIZER)


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "config": {"a": 1}}, tmp_path / "w.pth")
    with pytest.raises(SystemExit, match="w.pth: holds no weights, but epoch, config"):
        read_weights(tmp_path / "w.pth")


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_code_is_not_run_and_what_is_absent_is_said(tmp_path):
    trap = Trap(tmp_path / "sprung")
    torch.save({"weight": trap}, tmp_path / "evil.pth")
    torch.save({"step": 1, "args": trap}, tmp_path / "trainer.pt")
    torch.save({"state_dict": trap}, tmp_path / "bomb.pth")
    for read in (lambda: read_weights(tmp_path / "evil.pth"),
                 lambda: load_trainer(tmp_path, SimpleNamespace()),
                 lambda: load_models("shapes", ckpt=tmp_path / "bomb.pth")):
        with pytest.raises(Exception, match="(?i)weights.only"):
            read()
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "empty").mkdir()
    for name, said in (("empty", "no weights there"), ("absent.pth", "no such file of weights")):
        with pytest.raises(SystemExit, match=f"{name}: .*{said}"):
            read_weights(tmp_path / name)


def test_an_adapter_of_peft_is_to_be_merged_first(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SystemExit, match="is an adapter of peft; merge it into its base first"):
        load_models("shapes", ckpt=tmp_path)
