"""Prompts: files of all makers, and those made for GenEval."""
import hashlib
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import run

import sample
import train
from model import describe
from prompts import make_geneval
from shapes import world
from support import geneval
from support.prompts import read_prompts


def test_a_folder_of_texts_in_the_order_of_their_names(tmp_path):
    """As DPG-Bench; pictures are named after them."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("10", "a ring"), ("2", "a star\n"), ("1", "a moon"), ("x.md", "no")):
        (folder / (name if "." in name else f"{name}.txt")).write_text(text)
    assert read_prompts(folder) == [{"prompt": "a moon", "name": "1"},
                                    {"prompt": "a star", "name": "2"},
                                    {"prompt": "a ring", "name": "10"}]
    run(sample, "--model", "shapes", "--prompts", folder, "--steps", 1, "--out", tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").glob("*.png")) == ["1-00.png", "10-00.png",
                                                                       "2-00.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="there is no prompt in it"):
        read_prompts(tmp_path / "empty")


def test_prompts_that_stand_twice_and_many_prompts(base):
    said = describe(*base, ["a photo of a star"] * 13 + ["a photo of a moon"])
    assert said.endswith("; 14 prompts, 2 different")
    asked, tokenizer = [], base[0].tokenizer
    showo = SimpleNamespace(tokenizer=lambda some: asked.append(len(some)) or tokenizer(some),
                            parameters=base[0].parameters, source="", N=1, K=1, device="cpu")
    describe(showo, base[1], [f"a photo of {i}" for i in range(30_000)])
    assert asked == [10_000]


def test_an_epoch_has_one_order(monkeypatch):
    train.order_of_epoch.cache_clear()
    drawn, plain = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **how: drawn.append(n) or plain(n, **how))
    for slot in range(50):
        train.example_at(slot, list(range(40)), seed=3)
    assert drawn == [40, 40]


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
    # COCO's captions_val2014.json, and the key of a list inside
    ("coco.json:annotations", '{"info": {"x": 1}, "annotations": [{"id": 7, "caption": "a cat"}, '
     '{"id": 8, "caption": "a dog"}]}', ["a cat", "a dog"]),
    ("ids.json", '{"7": {"prompt": "a cat"}, "8": {"prompt": "a dog"}}', ["a cat", "a dog"]),
    ("inside.json", '{"prompts": ["a cat", "a dog"]}', ["a cat", "a dog"]),
    ("inside2.json", '{"name": "x", "prompts": [{"prompt": "a cat"}]}', ["a cat"]),
    ("files.json", '{"a.jpg": "a cat", "b.jpg": "a dog"}', ["a cat", "a dog"]),
    ("one.json", '{"prompt": "a cat", "note": "x"}', ["a cat"]),
    ("key.json:long", '{"short": "a", "long": "a cat"}', ["a cat"]),
    ("german.csv", 'id;prompt\n1;a cat, asleep\n2;a dog\n', ["a cat, asleep", "a dog"]),
    ("questions.csv", "item,text,question\n1,a cat,is it?\n1,a cat,where?\n", ["a cat"] * 2)])
def test_prompt_files(tmp_path, name, content, wanted):
    (tmp_path / name.split(":")[0]).write_bytes(content.encode())
    examples = read_prompts(tmp_path / name)
    assert [example["prompt"] for example in examples] == wanted
    if name == "draw.csv":
        assert examples[0]["Category"] == "Animals"         # other columns stay


def test_prompt_files_keep_what_else_their_lines_hold(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\n  two words \n")
    assert read_prompts(str(text)) == [{"prompt": "one"}, {"prompt": "two words"}]
    lines.write_text('{"prompt": "a", "reward_prompt": "b", "tag": "x"}\n\n{"prompt": "c"}\n')
    assert read_prompts(lines) == [{"prompt": "a", "reward_prompt": "b", "tag": "x"},
                                          {"prompt": "c"}]


def test_prompt_files_of_other_systems(tmp_path):
    """A byte order mark, carriage returns, and what only Python takes for a line's end."""
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("\ufeffein Käfer\r\n\r\ntwo\u2028words\x0b!\r\n\u00a0x \u00a0\n{}".encode())
    assert [entry["prompt"] for entry in read_prompts(text)] == [
        "ein Käfer", "two\u2028words\x0b!", "x", "{}"]
    lines.write_bytes('\ufeff{"prompt": "Käfer"}\r\n{"prompt": "b"}'.encode())
    assert [entry["prompt"] for entry in read_prompts(lines)] == ["Käfer", "b"]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"prompt": "x"}\nnot json\n', "cannot be read .Expecting value"),
    ("b.jsonl", b'{"prompt": "x"}\n{"short": "x", "long": "y"}',
     "number 2 has no prompt, but short, long; name one: .*b.jsonl:KEY"),
    ("c.csv", b"a cat,1\na dog,2\n", "number 1 has no prompt, but a cat, 1"),
    ("d.json", b'{"a": ["x"]}', "number 1 has no prompt, but a; name one"),
    ("e.json", b'["x", 3]', "number 2 has no prompt, but 3"),
    ("f.jsonl", b'{"prompt": null}', "number 1 has no prompt"),
    ("c.txt", b" \n", "there is no prompt in it"),
    ("d.parquet", b"", "wanted .txt"), ("e.txt", None, "cannot be read")])
def test_bad_prompt_files_are_said(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message) as refused:
        read_prompts(tmp_path / name)
    assert str(refused.value).startswith(str(tmp_path / name))


def test_the_553_prompts():
    text = "".join(json.dumps(example) + "\n" for example in make_geneval.geneval_prompts())
    assert (hashlib.sha256(text.encode()).hexdigest()
            == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13")
    assert len(make_geneval.geneval_prompts(seed=7, n=5)) == 30


@pytest.mark.parametrize("name, made", [
    ("prompts/geneval.jsonl", make_geneval.geneval_prompts()),
    ("shapes/train.jsonl", world.prompts("train")), ("shapes/eval.jsonl", world.prompts("eval"))])
def test_files_and_what_makes_them_agree(name, made):
    assert read_prompts(name) == made
    assert name != "prompts/geneval.jsonl" or len(made) == 553


def asked(example):
    """What a prompt asks: classes with counts and colours; of a position, the pair and the axis."""
    things = frozenset((c["class"], c["count"], c.get("color")) for c in example["include"])
    relations = [c["position"][0] for c in example["include"] if "position" in c]
    axis = {"left of": "x", "right of": "x", "above": "y", "below": "y"}
    return example["tag"], things, tuple(axis[r] for r in relations)


def test_training_prompts_are_geneval_s_and_none_of_the_553(tmp_path):
    run(make_geneval, "--train", tmp_path / "train.jsonl", "--n", 6800)
    examples = read_prompts(tmp_path / "train.jsonl")
    assert examples == make_geneval.training_prompts(6800) and len(examples) == 6800
    geneval.check_metadata(examples)
    official = {asked(example) for example in make_geneval.geneval_prompts()}
    assert not official & {asked(example) for example in examples}

    counts = Counter(example["tag"] for example in examples)
    wanted = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    assert counts.keys() == wanted.keys()
    for tag, share in wanted.items():
        assert abs(counts[tag] - 400 * share) < 4 * (400 * share) ** 0.5
