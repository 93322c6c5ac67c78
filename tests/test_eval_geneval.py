"""eval_geneval.py against verdicts, relations, IoUs, summaries and detections of the official code (tests/data/README.md)."""
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, ROOT, read_json, read_lines
from PIL import Image
from safetensors.torch import load_file, save_file

import eval_geneval
import shapes
from eval_geneval import (CLASSES, COLOURS, Detector, compute_iou, draw_folder, exact_score, filter_detections, geneval_prompts, instances,
                          main, read_picture, relative_position, report, score, score_folder, scores, strict_score, summary)
from model import InputError

CASES = ["", "_extra"]


@pytest.mark.parametrize("which", CASES)
def test_verdicts(which):
    for case in read_lines(f"geneval/scoring_cases{which}.jsonl"):
        kept = filter_detections(case["detections"], case["metadata"]["tag"])
        assert kept == case["expected"]["kept"], case["id"]
        assert score(kept, case["metadata"], case["colors"]) == (case["expected"]["correct"], case["expected"]["reason"]), case["id"]


@pytest.mark.parametrize("which", CASES)
def test_training_rewards(which):
    cases = {case["id"]: case for case in read_lines(f"geneval/scoring_cases{which}.jsonl")}
    for wanted in read_lines(f"geneval/reward_cases{which}.jsonl"):
        case = cases[wanted["id"]]
        kept = filter_detections(case["detections"], case["metadata"]["tag"])
        correct, reason, partial = strict_score(kept, case["metadata"], case["colors"])
        assert (correct, reason) == (wanted["strict_correct"], wanted["strict_reason"]), wanted["id"]
        assert partial == pytest.approx(wanted["score_position_fixed"], abs=1e-9), wanted["id"]


def test_exact_is_strict_and_nothing_else():
    line = {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}]}
    cow = lambda s: [0.0, 0.0, 9.0, 9.0, s]  # noqa: E731
    assert exact_score({"cow": [cow(0.95), cow(0.96)]}, line, {})
    assert not exact_score({"cow": [cow(0.95), cow(0.96)], "dog": [cow(0.4)]}, line, {})     # something else, though faint
    assert not exact_score({"cow": [cow(0.95), cow(0.96), cow(0.5)]}, line, {})              # a third, though faint
    assert not exact_score({"cow": [cow(0.95)]}, line, {})


def test_relations():
    for case in read_lines("geneval/relative_position_cases.jsonl"):
        assert sorted(relative_position(case["a"], case["b"])) == case["expected"], case["id"]


def test_iou():
    for case in read_lines("geneval/iou_cases.jsonl"):
        assert compute_iou(case["a"], case["b"]) == pytest.approx(case["expected"], abs=1e-6), case["id"]


@pytest.mark.parametrize("name", ["full", "one_per_prompt", "three_tags"])
def test_summary(name):
    assert summary(read_lines(f"geneval/summary/{name}_results.jsonl")) == (DATA / f"geneval/summary/{name}_summary.txt").read_text()


def test_the_553_prompts():
    text = "".join(json.dumps(line) + "\n" for line in geneval_prompts())
    assert hashlib.sha256(text.encode()).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert len(geneval_prompts(seed=7, n=5)) == 30


@pytest.mark.parametrize("case", read_json("geneval/detector_postprocess/cases.json"), ids=lambda case: str(case["case"]))
def test_instances_are_those_of_mmdet(case):
    facts = load_file(DATA / f"geneval/detector_postprocess/case{case['case']}.safetensors")
    sizes = [case[name] for name in ("padded_hw", "img_hw", "ori_hw")]
    labels, boxes, masks = instances(facts["class_queries_logits"][0], facts["masks_queries_logits"][0], *sizes, case["max_per_image"])
    rows = [(label, -box[4], *box[:4], i) for i, (label, box) in enumerate(zip(labels.tolist(), boxes.tolist()))]
    order = [row[-1] for row in sorted(rows)]
    assert torch.equal(labels[order], facts["labels"])
    torch.testing.assert_close(boxes[order], facts["boxes"], atol=1e-5, rtol=0)
    packed = np.packbits(masks[order].flatten(1).numpy(), axis=1)
    assert (packed == facts["masks_packed"].numpy()).all()
    confident = instances(facts["class_queries_logits"][0], facts["masks_queries_logits"][0], *sizes, case["max_per_image"], min_score=0.3)
    above = lambda found: sorted(box for box in found[1].tolist() if box[4] > 0.3)  # noqa: E731
    torch.testing.assert_close(torch.tensor(above(confident)), torch.tensor(above((labels, boxes, masks))))
    assert len(confident[0]) < len(labels)
    assert [len(x) for x in instances(torch.zeros(3, 5), torch.zeros(3, 4, 4), (8, 8), (8, 8), (8, 8), min_score=0.3)] == [0, 0, 0]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A tiny Mask2Former with random weights, loaded from a folder as the real one is; a tiny CLIP for the colours."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
                               decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=6, num_labels=80)
    config.id2label = {i: name for i, name in enumerate(CLASSES)}
    model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data *= 60
    model.save_pretrained(folder)
    (folder / "tiny.json").write_text(json.dumps(read_json("clip_tiny/config.json")["open_clip"] | {
        "text_cfg": read_json("clip_tiny/config.json")["open_clip"]["text_cfg"] | {"vocab_size": 49408}}))
    open_clip.add_model_config(folder / "tiny.json")
    torch.save(open_clip.create_model("tiny").state_dict(), folder / "tiny.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_geneval, "COLOUR_CLIP", f"tiny/{folder / 'tiny.pt'}")
        yield Detector(folder)


def test_the_detector_end_to_end(detector, monkeypatch):
    """Against the steps one by one, a picture at a time, with PIL's own resize of the crop and open_clip's own classifier."""
    monkeypatch.setattr(eval_geneval, "THRESHOLD", 0.05)
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(rng.integers(0, 256, (3, 3, 10, 8), dtype=np.uint8)).repeat_interleave(5, 2).repeat_interleave(5, 3)
    seen = []
    plain = detector.model.forward
    monkeypatch.setattr(detector.model, "forward", lambda **inputs: seen.append(inputs["pixel_values"]) or plain(**inputs))
    nothing = [{"tag": "colors", "include": [{"class": "cat", "count": 1}]}] * 3
    alone = [pair for i in range(3) for pair in detector(pictures[i:i + 1], nothing)]
    assert seen[0].shape == (1, 3, 1024, 800)                                   # 50 x 40 -> 1000 x 800 -> a multiple of 32
    assert (seen[0][0, :, 1000:, :].amax((1, 2)) - (128 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])).abs().max() < 1e-5
    names = sorted({name for found, _ in alone for name in found})
    lines = [{"tag": "colors", "include": [{"class": name, "count": 1, "color": "red"} for name in names]}] * 3
    together = detector(pictures, lines)
    assert names
    for (ours, _), (other, _) in zip(together, alone):
        assert ours.keys() == other.keys()
        for name in ours:
            torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(other[name]), atol=1e-3, rtol=1e-3)
    model, transform, tokenizer = detector.clip, detector.transform, detector.tokenizer
    judged = 0
    for picture, (found, colours) in zip(pictures, together):
        kept = filter_detections(found, "colors")
        assert colours.keys() == kept.keys()
        scores_ = [box[4] for boxes in found.values() for box in boxes]
        assert all(boxes == sorted(boxes, key=lambda box: box[4]) for boxes in found.values()) and max(scores_) > 0.05
        for name in kept:
            texts = [[f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object"] for c in COLOURS]
            with torch.no_grad():
                means = torch.stack([F.normalize(F.normalize(model.encode_text(tokenizer(t)), dim=-1).mean(0), dim=-1) for t in texts])
                for box, colour in zip(kept[name], colours[name]):
                    mask = mask_of(detector, picture, box)
                    crop = Image.composite(Image.fromarray(picture.permute(1, 2, 0).numpy()), Image.new("RGB", (40, 50), "#999"), mask).crop(box[:4])
                    logits = F.normalize(model.encode_image(transform(crop)[None]), dim=-1) @ means.T
                    assert COLOURS[logits[0].argmax()] == colour
                    judged += 1
    assert judged > 3


def mask_of(detector, picture, box):
    """The mask of a box, found again by its coordinates and score."""
    with torch.no_grad():
        x = F.interpolate(picture[None].float(), (1000, 800), mode="bilinear").round()
        x = F.pad(x, (0, 0, 0, 24), value=128)
        x = (x - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)) / torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
        raw = detector.model(pixel_values=x)
        _, boxes, masks = instances(raw.class_queries_logits[0], raw.masks_queries_logits[0], (1024, 800), (1000, 800), (50, 40))
    return Image.fromarray((masks[(boxes - torch.tensor(box)).abs().sum(1).argmin()].numpy() * 255).astype(np.uint8))


def test_a_detector_of_other_classes_is_refused(detector, tmp_path):
    detector.model.save_pretrained(tmp_path / "lacking")
    state = load_file(tmp_path / "lacking/model.safetensors")
    del state["class_predictor.bias"]
    save_file(state, tmp_path / "lacking/model.safetensors", metadata={"format": "pt"})
    config = detector.model.config.to_dict() | {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    type(detector.model)(type(detector.model.config)(**config)).save_pretrained(tmp_path / "pets")
    for folder, message in (("lacking", "1 weights missing, e.g. .'class_predictor.bias'"), ("pets", "80 COCO classes .2 classes")):
        with pytest.raises(InputError, match=message):
            Detector(tmp_path / folder)
    with pytest.raises(InputError, match="--detector|no such"):
        Detector(tmp_path / "absent")


LINES = shapes.prompts("eval")[::9]


def truth(prompts, n, seeds):
    """Draws each prompt's picture as it should be; the seed makes the noise of nothing."""
    by_text = {line["prompt"]: line for line in LINES}
    import random
    return torch.stack([shapes.render(by_text[text], random.Random(seed * 10 + k))[0] for text, seed in zip(prompts, seeds) for k in range(n)])


def test_drawing_is_resumed_and_broken_pictures_drawn_again(tmp_path):
    parts = [draw_folder(tmp_path / "two", LINES, 2, truth, 3, rank, 2) for rank in (0, 1)]
    assert draw_folder(tmp_path / "one", LINES, 2, truth, 64) == sum(parts) == 2 * len(LINES)
    files = sorted(f.relative_to(tmp_path / "one") for f in (tmp_path / "one").rglob("*") if f.is_file())
    assert len(files) == 3 * len(LINES) and str(files[1]) == "00000/samples/0000.png"
    same = lambda: all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)  # noqa: E731
    assert same()
    kept = tmp_path / "two/00003/samples/0000.png"
    kept.write_bytes((tmp_path / "one/00004/samples/0000.png").read_bytes())    # whole, so it stays
    (tmp_path / "two/00003/samples/0001.png").write_bytes(kept.read_bytes()[:80])
    (tmp_path / "two/00005/samples/0000.png").unlink()
    assert read_picture(tmp_path / "two/00003/samples/0001.png") is None
    assert draw_folder(tmp_path / "two", LINES, 2, truth, 64) == 2 and not same()
    kept.write_bytes((tmp_path / "one/00003/samples/0000.png").read_bytes())
    assert same()
    (tmp_path / "two/00001/metadata.jsonl").write_text("")                       # as a kill leaves it
    assert draw_folder(tmp_path / "two", LINES, 2, truth, 64) == 0 and same()
    with pytest.raises(InputError, match="00001 belongs to another prompt"):
        draw_folder(tmp_path / "two", [LINES[0], LINES[2]], 2, truth, 64)


def test_scoring_a_folder(tmp_path, capsys):
    draw_folder(tmp_path, LINES, 2, truth, 64)
    Image.new("RGB", (32, 32)).save(tmp_path / "00002/samples/0001.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "00002/samples/grid.png")        # ignored
    rows = sorted(score_folder(tmp_path, shapes.detect, 3, 0, 2) + score_folder(tmp_path, shapes.detect, 5, 1, 2), key=lambda row: row["filename"])
    assert rows == score_folder(tmp_path, shapes.detect)
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert [row["correct"] for row in rows] == [i != 5 for i in range(2 * len(LINES))]
    report(tmp_path, rows, {"detector": "x"})
    numbers = json.loads((tmp_path / "summary.json").read_text())
    assert numbers["detector"] == "x" and numbers["images"] == 2 * len(LINES) and "warning" not in numbers
    assert numbers["overall"] == pytest.approx(1 - 0.5 / sum(line["tag"] == LINES[2]["tag"] for line in LINES) / len({line["tag"] for line in LINES}), abs=1e-5)
    assert (tmp_path / "failures.txt").read_text().startswith(f"{tmp_path}/00002/samples/0001.png: {LINES[2]['prompt']}: expected ")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows) and "95% intervals" in capsys.readouterr().out
    (tmp_path / "00001/samples/0001.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="0001.png: is not a readable picture"):
        score_folder(tmp_path, shapes.detect)
    for f in (tmp_path / "00001/samples").iterdir():
        f.unlink()
    with pytest.raises(InputError, match="00001/samples: holds no picture"):
        score_folder(tmp_path, shapes.detect)
    with pytest.raises(InputError, match="pictures of 32 x 32, not 40 x 40"):
        shapes.detect(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))
    (tmp_path / "00001/metadata.jsonl").write_text("{}")
    with pytest.raises(InputError, match="lacks GenEval metadata"):
        score_folder(tmp_path, shapes.detect)


def test_intervals_are_those_of_the_prompts():
    """Two tags, prompts all right or all wrong: the interval of a tag is that of a binomial over prompts, not over pictures."""
    rows = [{"tag": tag, "metadata": f"{tag}{i}", "correct": i % 2 == 0} for tag in ("a", "b") for i in range(100) for _ in range(4)]
    out = scores(rows)
    assert out["a"][0] == out["overall"][0] == 0.5
    assert [out["a"][2] - out["a"][1], out["overall"][2] - out["overall"][1]] == pytest.approx([4 * 0.05, 4 * 0.05 / 2 ** 0.5], rel=0.1)


def test_wrong_weights_are_said(tmp_path, capsys):
    rows = [{"filename": f"{i}.png", "tag": "single_object", "prompt": "x", "metadata": str(i), "correct": False, "reason": "no", "details": "{}"} for i in range(30)]
    report(tmp_path, rows, {"detector": "x"})
    assert "its weights look wrong" in capsys.readouterr().err and "warning" in json.loads((tmp_path / "summary.json").read_text())


def test_the_command_on_two_processes_is_that_on_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:5]))
    flags = ["eval_geneval.py", "--model", "shapes", "--prompts", str(tmp_path / "p.jsonl"), "--images-per-prompt", "2", "--device", "cpu"]

    def one(*more):
        monkeypatch.setattr(sys, "argv", [*flags, "--out", str(tmp_path / "one"), *more])
        main()
        return capsys.readouterr().out
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *flags, "--out", str(tmp_path / "two"),
                          "--steps", "4"], cwd=ROOT, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr
    assert "process 0: drew 10 pictures" in one("--steps", "4")
    rows = [[json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert len(rows[0]) == 10 and [row | {"filename": ""} for row in rows[0]] == [row | {"filename": ""} for row in rows[1]]
    assert "process 1: drew 4 pictures" in two.stdout and not list((tmp_path / "two").glob(".rows*"))
    assert "process 0: drew 0 pictures" in one("--steps", "4")
    with pytest.raises(SystemExit):
        one("--steps", "5")
    assert "drawn with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"prompt": 3}, {"tag": None}, {"include": []}, {"include": [{"class": "cat", "count": 0}]}, {"exclude": 1},
                                    {"include": [{"class": "cat", "count": True}]}, {"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}])
def test_broken_metadata_is_no_metadata(change):
    line = geneval_prompts()[0]
    assert eval_geneval.is_geneval(line) and not eval_geneval.is_geneval(line | change) and not eval_geneval.is_geneval([line])


@pytest.mark.parametrize("flags, message", [
    ([], "give --out DIR"), (["--out", "x", "--score-only", "y"], "give --out DIR"), (["--score-only", "/no/such"], "not a folder of the official layout"),
    (["--out", "x", "--model", "shapes", "--device", "gpu"], "--device gpu: cannot be used"), (["--out", str(ROOT), "--model", "shapes"], "is not empty")])
def test_bad_commands(monkeypatch, capsys, flags, message):
    from sample import run
    monkeypatch.setattr(sys, "argv", ["eval_geneval.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1
