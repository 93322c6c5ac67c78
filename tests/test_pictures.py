"""Pictures: drawn once, read, put into grids, found in folders of other makers."""
import os

import numpy as np
import pytest
import torch
from PIL import Image

from support import pictures
from support.pictures import find_pictures


def test_a_grid_enlarges_small_pictures_and_writes_captions_under_them():
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 32, 32) * 40
    sheet = pictures.grid(images, ["a long caption that needs two lines"] * 6, 3)
    assert sheet.size == (3 * 132, 2 * 160)
    for i in range(6):
        x, y = i % 3 * 132, i // 3 * 160
        picture = sheet.crop((x + 2, y + 2, x + 130, y + 130))
        assert picture.getextrema() == ((40 * i, 40 * i),) * 3
        caption = sheet.crop((x, y + 130, x + 132, y + 160)).convert("L")
        assert caption.getextrema()[0] < 100 and caption.getpixel((131, 29)) == 255
    with pytest.raises(ValueError):
        pictures.grid(images, ["one caption"], 2)


def test_a_picture_keeps_its_pixels(tmp_path):
    image = torch.randint(256, (3, 4, 5), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    pictures.to_pil(image).save(tmp_path / "x.png")
    assert torch.equal(pictures.read_picture(tmp_path / "x.png"), image)


def test_a_picture_is_whole_up_to_its_last_byte(tmp_path):
    path = tmp_path / "x.png"
    assert not pictures.is_whole(path)
    Image.new("RGB", (48, 48), "red").save(path)
    assert pictures.is_whole(path)
    for size in (path.stat().st_size - 20, 60, 8, 0):
        os.truncate(path, size)
        assert not pictures.is_whole(path)


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert pictures.read_picture(tmp_path / "x.png").tolist() == [[[0, 100, 255]]] * 3


def test_pictures_that_are_there_are_kept(tmp_path):
    files = {i: [tmp_path / f"{i}-{k}.png" for k in range(2)] for i in (3, 5, 8)}
    examples, drawn = [{"prompt": str(i)} for i in range(9)], []

    def draw(prompts, n, seeds):
        drawn.append((prompts, list(seeds)))
        return torch.full((len(prompts) * n, 3, 8, 8), 7, dtype=torch.uint8)
    assert pictures.draw_missing(files, examples, draw, 4) == 6
    assert drawn == [(["3", "5"], [3, 5]), (["8"], [8])]
    files[5][1].unlink()
    assert pictures.draw_missing(files, examples, draw, 4) == 2 and drawn[-1] == (["5"], [5])
    assert pictures.draw_missing(files, examples, draw, 4) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f.name for paths in files.values() for f in paths)


@pytest.mark.parametrize("names, wanted", [
    (["a cat_000000.png", "a cat_000001.png", "a dog_000000.png", "a dog_000001.png"], "ccdd"),
    (["a cat.jpg", "a dog.JPEG"], "cd"), (["a cat/0.png", "a dog/0.png"], "cd"),
    (["00000/grid.png", "00000/samples/0.png", "00001/samples/0.png"], ".cd"),
    (["000000-00.png", "000000-01.png", "000001-00.png", "000001-01.png"], "ccdd"),
    (["42_0.png", "42_1.png", "43_0.png", "43_1.png"], "cdcd"),        # the seed comes first
    (["seed0-0.png", "seed0-1.png", "seed1-0.png", "seed1-1.png"], "cdcd"),
    (["00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png",
      "00001/samples/0001.png"], "ccdd"),
    (["s8.webp", "s9.webp", "s10.webp", "s11.webp"], "ccdd"),           # 10 follows 9
    ([".ipynb_checkpoints/0-checkpoint.png", "0.png", "1.png"], ".cd")])
def test_pictures_go_to_their_prompts(tmp_path, names, wanted):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    cats, dogs = find_pictures(tmp_path, ["a cat", "a dog"])
    for letter, found in (("c", cats), ("d", dogs)):
        assert sorted(p.relative_to(tmp_path).as_posix() for p in found) == sorted(
            name for name, which in zip(names, wanted, strict=True) if which == letter)


def test_pictures_of_several_processes_go_to_their_prompts(tmp_path):
    for i in range(4):
        (tmp_path / f"rank{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"rank{i % 2}/{i}.png").touch()
    assert [found[0].name for found in find_pictures(tmp_path, list("wxyz"))] == [
        "0.png", "1.png", "2.png", "3.png"]


def test_pictures_whose_names_leave_a_prompt_out_are_refused(tmp_path):
    for name in ("a cat_0.png", "a-dog_0.png"):
        (tmp_path / name).touch()
    with pytest.raises(SystemExit, match="names begin with prompts, but not 1 with each"):
        find_pictures(tmp_path, ["a cat", "a/dog"])


def test_equal_prompts_share_their_pictures_in_order(tmp_path):
    for name in ("a cat_0.png", "a cat_1.png", "a dog_0.png", "a cat_2.png", "a cat_3.png",
                 "a dog_1.png"):
        (tmp_path / name).touch()
    found = find_pictures(tmp_path, ["a cat", "a dog", "a cat"])
    assert [[path.name for path in paths] for paths in found] == [
        ["a cat_0.png", "a cat_1.png"], ["a dog_0.png", "a dog_1.png"],
        ["a cat_2.png", "a cat_3.png"]]
