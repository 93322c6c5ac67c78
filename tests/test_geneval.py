"""GenEval's rules and detector against the official code: verdicts, relations, IoUs, detections.

tests/data/README.md says how the expected values were made."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DATA, read_json, read_lines, tiny_clip
from PIL import Image
from rehearsal import save_tiny_mask2former
from safetensors.torch import load_file, save_file

from support import geneval
from support.geneval import COLOURS, Detector, filter_detections, instances

MEAN = torch.tensor([123.675, 116.28, 103.53])
STD = torch.tensor([58.395, 57.12, 57.375])


@pytest.mark.parametrize("which", ["", "_extra"])
def test_verdicts_and_training_rewards(which):
    cases = {case["id"]: case for case in read_lines(f"geneval/scoring_cases{which}.jsonl")}
    for case in cases.values():
        metadata, expected = case["metadata"], case["expected"]
        case["kept"] = kept = filter_detections(case["detections"], metadata["tag"])
        assert kept == expected["kept"], case["id"]
        verdict = geneval.score(kept, metadata, case["colors"])
        assert verdict == (expected["correct"], expected["reason"]), case["id"]
    for wanted in read_lines(f"geneval/reward_cases{which}.jsonl"):
        case = cases[wanted["id"]]
        kept = case["kept"]
        correct, reason, partial = geneval.strict_score(kept, case["metadata"], case["colors"])
        assert correct == wanted["strict_correct"], wanted["id"]
        assert reason == wanted["strict_reason"], wanted["id"]
        assert partial == pytest.approx(wanted["score_position_fixed"], abs=1e-9), wanted["id"]


def test_exact_is_strict_and_nothing_else():
    example = {"tag": "counting", "include": [{"class": "cow", "count": 2}],
               "exclude": [{"class": "cow", "count": 3}]}

    def exact(cows, **others):
        raw = {"cow": cows} | others
        boxes = {name: [[0.0, 0.0, 9.0, 9.0, s] for s in scores] for name, scores in raw.items()}
        return geneval.exact_score(boxes, example, {})

    assert exact([0.95, 0.96])
    assert not exact([0.95, 0.96], dog=[0.4])           # something else, though faint
    assert not exact([0.95, 0.96, 0.5])                 # a third, though faint
    assert not exact([0.95])


def test_relations():
    for case in read_lines("geneval/relative_position_cases.jsonl"):
        found = geneval.relative_position(case["a"], case["b"])
        assert sorted(found) == case["expected"], case["id"]


@pytest.mark.parametrize("clause", [{"class": "unicorn"}, {"color": "mauve"},
                                    {"position": ["behind", 0]}])
def test_what_the_detector_does_not_know_is_said(clause):
    """Such a prompt would have the reward 0 for ever."""
    example = {"tag": "colors", "prompt": "a photo of a red cow",
               "include": [{"class": "cow", "count": 1, "color": "red"}]}
    geneval.check_metadata([example])
    example["include"][0] |= clause
    with pytest.raises(SystemExit, match="the detector knows, not .* of 'a photo of a red cow'"):
        geneval.check_metadata([example])
    for lacking in ({"prompt": "a cow"}, {"prompt": "x", "tag": "colors"}):
        with pytest.raises(SystemExit, match="need a tag and metadata"):
            geneval.check_metadata([lacking])


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
    _, weights = tiny_clip(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geneval, "COLOUR_CLIP", f"tiny/{weights}")
        yield Detector(folder)


def test_the_detector_end_to_end(detector, monkeypatch):
    """Against the steps one by one, a picture at a time, with open_clip's own classifier."""
    monkeypatch.setattr(geneval, "THRESHOLD", 0.05)
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
        masked = boxes_and_masks(detector, picture)
        for name in kept:
            directions = colour_directions(detector, name)
            for box, colour in zip(kept[name], colours[name], strict=True):
                features = crop_features(detector, picture, box, *masked)
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
def crop_features(detector, picture, box, boxes, masks):
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    nearest = (boxes - torch.tensor(box)).abs().sum(1).argmin()     # by coordinates and score
    mask = Image.fromarray((masks[nearest].numpy() * 255).astype(np.uint8))
    crop = Image.composite(image, Image.new("RGB", (40, 50), "#999"), mask).crop(box[:4])
    return F.normalize(detector.clip.encode_image(detector.transform(crop)[None]), dim=-1)[0]


@torch.no_grad()
def boxes_and_masks(detector, picture):
    x = F.interpolate(picture[None].float(), (1000, 800), mode="bilinear").round()
    x = F.pad(x, (0, 0, 0, 24), value=128)
    raw = detector.model(pixel_values=(x - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    return instances(raw.class_queries_logits[0], raw.masks_queries_logits[0], (1024, 800),
                     (1000, 800), (50, 40))[1:]


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
