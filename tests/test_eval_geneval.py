"""eval_geneval.py against the official code: verdicts, relations, IoUs, summaries, detections.

tests/data/README.md says how the expected values were made."""
import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, ROOT, read_json, read_lines
from PIL import Image
from rehearsal import save_tiny_mask2former
from safetensors.torch import load_file, save_file

import eval_geneval
import shapes
from eval_geneval import COLOURS, Detector, filter_detections, instances

sys.path.append(str(ROOT / "shapes"))
from pretrain import render  # noqa: E402

CASES = ["", "_extra"]
MEAN = torch.tensor([123.675, 116.28, 103.53])
STD = torch.tensor([58.395, 57.12, 57.375])


# ------------------------------------------------------------------------------------- the rules

@pytest.mark.parametrize("which", CASES)
def test_verdicts(which):
    for case in read_lines(f"geneval/scoring_cases{which}.jsonl"):
        metadata, expected = case["metadata"], case["expected"]
        kept = filter_detections(case["detections"], metadata["tag"])
        assert kept == expected["kept"], case["id"]
        verdict = eval_geneval.score(kept, metadata, case["colors"])
        assert verdict == (expected["correct"], expected["reason"]), case["id"]


@pytest.mark.parametrize("which", CASES)
def test_training_rewards(which):
    cases = {case["id"]: case for case in read_lines(f"geneval/scoring_cases{which}.jsonl")}
    for wanted in read_lines(f"geneval/reward_cases{which}.jsonl"):
        case = cases[wanted["id"]]
        kept = filter_detections(case["detections"], case["metadata"]["tag"])
        correct, reason, partial = eval_geneval.strict_score(kept, case["metadata"], case["colors"])
        assert correct == wanted["strict_correct"], wanted["id"]
        assert reason == wanted["strict_reason"], wanted["id"]
        assert partial == pytest.approx(wanted["score_position_fixed"], abs=1e-9), wanted["id"]


def test_exact_is_strict_and_nothing_else():
    example = {"tag": "counting", "include": [{"class": "cow", "count": 2}],
               "exclude": [{"class": "cow", "count": 3}]}

    def exact(cows, **others):
        raw = {"cow": cows} | others
        boxes = {name: [[0.0, 0.0, 9.0, 9.0, s] for s in scores] for name, scores in raw.items()}
        return eval_geneval.exact_score(boxes, example, {})

    assert exact([0.95, 0.96])
    assert not exact([0.95, 0.96], dog=[0.4])           # something else, though faint
    assert not exact([0.95, 0.96, 0.5])                 # a third, though faint
    assert not exact([0.95])


def test_relations():
    for case in read_lines("geneval/relative_position_cases.jsonl"):
        found = eval_geneval.relative_position(case["a"], case["b"])
        assert sorted(found) == case["expected"], case["id"]


@pytest.mark.parametrize("name", ["full", "one_per_prompt", "three_tags"])
def test_summary(name):
    rows = read_lines(f"geneval/summary/{name}_results.jsonl")
    expected = (DATA / f"geneval/summary/{name}_summary.txt").read_text()
    assert eval_geneval.summary(rows) == expected


def test_the_553_prompts():
    text = "".join(json.dumps(example) + "\n" for example in eval_geneval.geneval_prompts())
    assert (hashlib.sha256(text.encode()).hexdigest()
            == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13")
    assert len(eval_geneval.geneval_prompts(seed=7, n=5)) == 30


@pytest.mark.parametrize("clause", [{"class": "unicorn"}, {"color": "mauve"},
                                    {"position": ["behind", 0]}])
def test_what_the_detector_does_not_know_is_said(clause):
    """Such a prompt would have the reward 0 for ever."""
    example = {"tag": "colors", "prompt": "a photo of a red cow",
               "include": [{"class": "cow", "count": 1, "color": "red"}]}
    eval_geneval.check_metadata([example], tiny=False)
    example["include"][0] |= clause
    with pytest.raises(SystemExit, match="the detector knows, not .* of 'a photo of a red cow'"):
        eval_geneval.check_metadata([example], tiny=False)
    for lacking in ({"prompt": "a cow"}, {"prompt": "x", "tag": "colors"}):
        with pytest.raises(SystemExit, match="need a tag and metadata"):
            eval_geneval.check_metadata([lacking], tiny=False)


# ---------------------------------------------------------------------------------- the detector

@pytest.mark.parametrize("case", read_json("geneval/detector_postprocess/cases.json"),
                         ids=lambda case: str(case["case"]))
def test_instances_are_those_of_mmdet(case):
    facts = load_file(DATA / f"geneval/detector_postprocess/case{case['case']}.safetensors")
    inputs = (facts["class_queries_logits"][0], facts["masks_queries_logits"][0],
              case["padded_hw"], case["img_hw"], case["ori_hw"], case["max_per_image"])
    labels, boxes, masks = instances(*inputs)
    rows = [(label, -box[4], *box[:4], i)
            for i, (label, box) in enumerate(zip(labels.tolist(), boxes.tolist(), strict=True))]
    order = [row[-1] for row in sorted(rows)]
    assert torch.equal(labels[order], facts["labels"])
    torch.testing.assert_close(boxes[order], facts["boxes"], atol=1e-5, rtol=0)
    packed = np.packbits(masks[order].flatten(1).numpy(), axis=1)
    assert (packed == facts["masks_packed"].numpy()).all()

    def above(boxes):
        return torch.tensor(sorted(box for box in boxes.tolist() if box[4] > 0.3))

    confident = instances(*inputs, min_score=0.3)
    torch.testing.assert_close(above(confident[1]), above(boxes))
    assert len(confident[0]) < len(labels)
    nothing = instances(torch.zeros(3, 5), torch.zeros(3, 4, 4), (8, 8), (8, 8), (8, 8),
                        min_score=0.3)
    assert [len(x) for x in nothing] == [0, 0, 0]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A tiny Mask2Former of random weights in a folder, as the real one; a tiny CLIP."""
    folder = tmp_path_factory.mktemp("detector")
    save_tiny_mask2former(folder)
    clip = read_json("clip_tiny/config.json")["open_clip"]
    clip["text_cfg"]["vocab_size"] = 49408
    (folder / "tiny.json").write_text(json.dumps(clip))
    open_clip.add_model_config(folder / "tiny.json")
    torch.save(open_clip.create_model("tiny").state_dict(), folder / "tiny.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_geneval, "COLOUR_CLIP", f"tiny/{folder / 'tiny.pt'}")
        yield Detector(folder)


def test_the_detector_end_to_end(detector, monkeypatch):
    """Against the steps one by one, a picture at a time, with open_clip's own classifier."""
    monkeypatch.setattr(eval_geneval, "THRESHOLD", 0.05)
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(rng.integers(0, 256, (3, 3, 10, 8), dtype=np.uint8))
    pictures = pictures.repeat_interleave(5, 2).repeat_interleave(5, 3)
    seen = []
    plain = detector.model.forward

    def forward(**inputs):
        seen.append(inputs["pixel_values"])
        return plain(**inputs)

    monkeypatch.setattr(detector.model, "forward", forward)
    uncoloured = [{"tag": "colors", "include": [{"class": "cat", "count": 1}]}]
    alone = [detector(picture[None], uncoloured)[0] for picture in pictures]
    assert seen[0].shape == (1, 3, 1024, 800)       # 50 x 40 -> 1000 x 800 -> a multiple of 32
    border = seen[0][0, :, 1000:, :].amax((1, 2))
    assert (border - (128 - MEAN) / STD).abs().max() < 1e-5

    names = sorted({name for found, _ in alone for name in found})
    include = [{"class": name, "count": 1, "color": "red"} for name in names]
    together = detector(pictures, [{"tag": "colors", "include": include}] * 3)
    assert names
    for (ours, _), (other, _) in zip(together, alone, strict=True):
        assert ours.keys() == other.keys()
        for name in ours:
            torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(other[name]),
                                       atol=1e-3, rtol=1e-3)

    n_boxes = 0
    for picture, (found, colours) in zip(pictures, together, strict=True):
        kept = filter_detections(found, "colors")
        assert colours.keys() == kept.keys()
        assert max(box[4] for boxes in found.values() for box in boxes) > 0.05
        for boxes in found.values():
            assert boxes == sorted(boxes, key=lambda box: box[4])
        for name in kept:
            directions = colour_directions(detector, name)
            for box, colour in zip(kept[name], colours[name], strict=True):
                features = crop_features(detector, picture, box)
                assert COLOURS[(features @ directions.T).argmax()] == colour
                n_boxes += 1
    assert n_boxes > 3


@torch.no_grad()
def colour_directions(detector, name):
    means = []
    for c in COLOURS:
        texts = [f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}",
                 f"a photo of a {c} object"]
        features = detector.clip.encode_text(detector.tokenizer(texts))
        means.append(F.normalize(F.normalize(features, dim=-1).mean(0), dim=-1))
    return torch.stack(means)


@torch.no_grad()
def crop_features(detector, picture, box):
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    mask = mask_of(detector, picture, box)
    crop = Image.composite(image, Image.new("RGB", (40, 50), "#999"), mask).crop(box[:4])
    return F.normalize(detector.clip.encode_image(detector.transform(crop)[None]), dim=-1)[0]


@torch.no_grad()
def mask_of(detector, picture, box):
    """The mask of a box, found again by its coordinates and score."""
    x = F.interpolate(picture[None].float(), (1000, 800), mode="bilinear").round()
    x = F.pad(x, (0, 0, 0, 24), value=128)
    raw = detector.model(pixel_values=(x - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    _, boxes, masks = instances(raw.class_queries_logits[0], raw.masks_queries_logits[0],
                                (1024, 800), (1000, 800), (50, 40))
    nearest = (boxes - torch.tensor(box)).abs().sum(1).argmin()
    return Image.fromarray((masks[nearest].numpy() * 255).astype(np.uint8))


def test_a_detector_of_other_classes_or_without_all_weights_is_refused(detector, tmp_path):
    """transformers would go on, with random weights."""
    detector.model.save_pretrained(tmp_path / "lacking")
    state = load_file(tmp_path / "lacking/model.safetensors")
    del state["class_predictor.bias"]
    save_file(state, tmp_path / "lacking/model.safetensors", metadata={"format": "pt"})
    pets = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    config = type(detector.model.config)(**detector.model.config.to_dict() | pets)
    type(detector.model)(config).save_pretrained(tmp_path / "pets")
    for folder in ("lacking", "pets"):
        with pytest.raises(SystemExit, match=f"{folder}: (lacks 1 weights|has 2 classes)"):
            Detector(tmp_path / folder)


# ------------------------------------------------------------------------------ folders, results

EXAMPLES = shapes.prompts("eval")[::9]


def truth(prompts, n, seeds):
    """Draw each prompt's picture as it should be."""
    by_text = {example["prompt"]: example for example in EXAMPLES}
    pictures = []
    for text, seed in zip(prompts, seeds, strict=True):
        for k in range(n):
            picture, _ = render(by_text[text], random.Random(seed * 10 + k))
            pictures.append(picture)
    return torch.stack(pictures)


def draw(out, batch=64, rank=0, world=1):
    return eval_geneval.draw_folder(out, EXAMPLES, 2, truth, batch, rank, world)


def test_drawing_is_shared_out_and_goes_on(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    parts = [draw(two, batch=3, rank=rank, world=2) for rank in (0, 1)]
    assert draw(one) == sum(parts) == 2 * len(EXAMPLES)
    files = sorted(f.relative_to(one) for f in one.rglob("*") if f.is_file())
    assert len(files) == 3 * len(EXAMPLES) and str(files[1]) == "00000/samples/0000.png"
    (two / "00005/samples/0000.png").unlink()
    assert draw(two) == 2 and draw(two) == 0
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_scoring_a_folder(tmp_path, capsys):
    def score(rank=0, world=1):
        return eval_geneval.score_folder(tmp_path, shapes.detect, rank, world)

    draw(tmp_path)
    Image.new("RGB", (48, 48)).save(tmp_path / "00002/samples/0001.png")
    rows = sorted(score(0, 2) + score(1, 2), key=lambda row: row["filename"])
    assert rows == score()
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata",
                             "details"]
    assert [row["correct"] for row in rows] == [i != 5 for i in range(2 * len(EXAMPLES))]

    eval_geneval.report(tmp_path, rows, {"detector": "x"})
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert numbers["detector"] == "x" and numbers["images"] == 2 * len(EXAMPLES)
    tags = [example["tag"] for example in EXAMPLES]
    share_wrong = 0.5 / tags.count(EXAMPLES[2]["tag"])
    assert numbers["overall"] == pytest.approx(1 - share_wrong / len(set(tags)), abs=1e-5)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)
    assert "Overall score" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="40"):       # the world has 48
        shapes.detect(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))


def test_intervals_are_those_of_the_prompts():
    """Prompts all right or all wrong: intervals of a binomial over prompts, not over pictures."""
    rows = [{"tag": tag, "metadata": f"{tag}{i}", "correct": i % 2 == 0}
            for tag in ("a", "b") for i in range(100) for _ in range(4)]
    out = eval_geneval.scores(rows)
    assert out["a"][0] == out["overall"][0] == 0.5
    widths = [out[name][2] - out[name][1] for name in ("a", "overall")]
    assert widths == pytest.approx([4 * 0.05, 4 * 0.05 / 2 ** 0.5], rel=0.1)


# --------------------------------------------------------------------------------- command lines

def test_the_command_on_two_processes_is_that_on_one(tmp_path, monkeypatch, capsys):
    prompts = "".join(json.dumps(example) + "\n" for example in EXAMPLES[:5])
    (tmp_path / "p.jsonl").write_text(prompts)
    flags = ["eval_geneval.py", "--model", "shapes", "--prompts", str(tmp_path / "p.jsonl"),
             "--images-per-prompt", "2", "--device", "cpu"]

    def one(*more):
        monkeypatch.setattr(sys, "argv", [*flags, "--out", str(tmp_path / "one"), *more])
        eval_geneval.main()
        return capsys.readouterr().out

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", "2"]
    two = subprocess.run([*torchrun, *flags, "--out", str(tmp_path / "two"), "--steps", "4"],
                         cwd=ROOT, text=True, capture_output=True)
    assert two.returncode == 0, two.stderr
    assert "Overall score" in one("--steps", "4")
    rows = {}
    for name in ("one", "two"):
        lines = (tmp_path / name / "results.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) | {"filename": ""} for line in lines]
    assert len(rows["one"]) == 10 and rows["one"] == rows["two"]
    assert two.stdout.count("Overall score") == 1


@pytest.mark.parametrize("flags, message", [
    ([], "give --out, the folder to draw into, or --score-only"),
    (["--model", "shapes", "--score-only", "/no/such"], "/no/such: no pictures there")])
def test_bad_commands(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["eval_geneval.py", *flags])
    with pytest.raises(SystemExit, match=message):
        eval_geneval.main()
