"""The embedded default: an exact detector, honest prompts, a base that draws crisply and is right about half of the time."""
import json
import random

import pytest
import torch
from conftest import ROOT

import shapes
from eval_geneval import exact_score, filter_detections, relative_position, score
from model import to_uint8

N_PICTURES = 2000


@pytest.fixture(scope="module")
def pictures():
    rng = random.Random(1)
    lines = shapes.prompts("all", N_PICTURES)
    return lines, [shapes.render(line, rng) for line in lines]


def exactly_right(found, objects):
    """Every object with class, colour and box, at a score over GenEval's counting threshold, and nothing else."""
    boxes, colours = found
    got = sorted((name, colour, *box[:4]) for name, rows in boxes.items() for box, colour in zip(reversed(rows), colours[name]) if box[4] > 0.9)
    wanted = sorted((name, colour, x * 8.0 + 1, y * 8.0 + 1, x * 8.0 + 8, y * 8.0 + 8) for (y, x), (name, colour) in objects.items())
    return got == wanted and sum(map(len, boxes.values())) == len(wanted)


def test_detector_is_right_on_every_rendered_picture(pictures):
    lines, drawn = pictures
    found = shapes.detect(torch.stack([image for image, _ in drawn]))
    for line, (_, objects), one in zip(lines, drawn, found):
        assert exactly_right(one, objects)
        kept = filter_detections(one[0], line["tag"])
        assert score(kept, line, one[1]) == (True, "") and exact_score(one[0], line, one[1])


def test_detector_is_right_on_tokenizer_reconstructions(pictures, base):
    _, drawn = pictures
    magvit, right = base[1], 0
    for i in range(0, N_PICTURES, 250):
        images = torch.stack([image for image, _ in drawn[i:i + 250]])
        again = to_uint8(magvit.decode(magvit.encode(shapes.scaled(images))))
        right += sum(exactly_right(one, objects) for one, (_, objects) in zip(shapes.detect(again), drawn[i:i + 250]))
    assert right >= 0.98 * N_PICTURES


def test_detector_sees_what_is_wrong():
    line = {"tag": "color_attr", "include": [{"class": "star", "count": 1, "color": "red"}, {"class": "moon", "count": 1, "color": "blue"}]}
    pictures = [{(0, 0): ("star", "red"), (2, 2): ("moon", "blue")}, {(0, 0): ("star", "blue"), (2, 2): ("moon", "red")},
                {(0, 0): ("star", "red")}, {(0, 0): ("star", "red"), (2, 2): ("moon", "blue"), (3, 3): ("moon", "blue")}]
    found = shapes.detect(torch.stack([shapes.paint(p, 0) for p in pictures]))
    assert [score(filter_detections(raw, line["tag"]), line, colours)[0] for raw, colours in found] == [True, False, False, True]
    assert [exact_score(raw, line, colours) for raw, colours in found] == [True, False, False, False]


def test_a_drawing_halfway_between_two_things_has_no_score():
    full, empty = (shapes.paint(p, 0).float() for p in ({(1, 1): ("cross", "green")}, {}))
    raw, _ = shapes.detect(((full + empty) / 2).to(torch.uint8)[None])[0]
    assert not filter_detections(raw, "")
    raw, _ = shapes.detect((0.95 * full + 0.05 * empty).to(torch.uint8)[None])[0]
    assert filter_detections(raw, "counting").keys() == {"cross"}


def test_colours_follow_the_kept_boxes():
    image = shapes.paint({(0, 0): ("ring", "red"), (1, 1): ("ring", "blue"), (2, 2): ("ring", "green")}, 1).float()
    ground = shapes.paint({}, 1).float()
    image[:, :8, :8] = 0.9 * image[:, :8, :8] + 0.1 * ground[:, :8, :8]
    raw, colours = shapes.detect(image.to(torch.uint8)[None])[0]
    boxes = filter_detections(raw, "")["ring"]
    assert {(box[0], colour) for box, colour in zip(boxes, colours["ring"])} == {(1.0, "red"), (9.0, "blue"), (17.0, "green")}
    assert colours["ring"][-1] == "red"             # the faintest comes last


def combination(line):
    """What a prompt asks, whatever the order of its words."""
    if line["tag"] != "position":
        return line["tag"], tuple(sorted((c["class"], c["count"], c.get("color", "")) for c in line["include"]))
    (y, x), relation = [c["class"] for c in line["include"]], line["include"][1]["position"][0]
    inverse = {"right of": "left of", "below": "above"}
    return ("position", x, relation, y) if relation not in inverse else ("position", y, inverse[relation], x)


def test_training_and_evaluation_prompts_are_disjoint():
    train, held_out = ({combination(line) for line in shapes.prompts(split, 3000)} for split in ("train", "eval"))
    assert not train & held_out and len(held_out) == 63
    assert {key[0] for key in train} == {key[0] for key in held_out} == set(shapes.FAMILIES)
    assert shapes.prompts("train", 60) == shapes.prompts("train", 60)


def test_positions_are_drawn_clearly(pictures):
    for line, (_, objects) in zip(*pictures):
        if line["tag"] == "position":
            (y, x), relation = [c["class"] for c in line["include"]], line["include"][1]["position"][0]
            at = {name: (8.0 * c, 8.0 * r, 8.0 * c + 7, 8.0 * r + 7) for (r, c), (name, _) in objects.items()}
            assert relation in relative_position(at[x], at[y])


def test_the_tokenizer_knows_every_word(base):
    texts = [line["prompt"] for line in shapes.prompts("all", 1200)]
    tokenizer = base[0].tokenizer
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(texts)["input_ids"])
    assert tokenizer("a zebra")["input_ids"][1] == tokenizer.unk_token_id


def test_codes_are_the_templates(pictures, base):
    images = torch.stack([image for image, _ in pictures[1][:500]])
    codes = shapes.TEMPLATE_CODE[shapes.distances(images).argmin(1)]
    assert (base[1].encode(shapes.scaled(images)).flatten() == codes).float().mean() > 0.999


def test_the_shipped_base_is_small_and_fair(base):
    size = sum(f.stat().st_size for f in (ROOT / "shapes").rglob("*") if f.is_file())
    assert size <= 12e6
    import train
    lines = shapes.prompts("eval")
    args = type("Args", (), {**train.PRESETS["shapes"], "eval_n": 8})
    row = train.evaluate(0, lines, args, *base, None, shapes.detect)
    assert 0.35 <= row["overall"] <= 0.60
    assert min(row[tag] for tag in shapes.FAMILIES) >= 0.10


def test_pretraining_repeats_itself(tmp_path):
    from safetensors.torch import load_file
    weights = []
    for run in ("a", "b"):
        shapes.pretrain_base(2, 7, pool=300, batch=8, hidden=32, layers=1).save(tmp_path / run)
        weights.append(load_file(tmp_path / run / "pytorch_model.safetensors"))
        assert json.loads((tmp_path / run / "config.json").read_text())["codebook_size"] == 64
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    first, second = (shapes.pretrain_tokenizer(2, 7, batch=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
