"""The rehearsal of a GPU user's workflow (rehearsal.py), with tiny models in the hub's cache under
the real names."""
from types import SimpleNamespace

import pytest
import rehearsal
import torch
from helpers import metrics, read_json

import train
from prompts import make_geneval
from support.run import checkpoints


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A hub cache of tiny models."""
    folder = tmp_path_factory.mktemp("home")
    rehearsal.make_hub(folder)
    return folder


@pytest.fixture
def work(home, tmp_path, monkeypatch):
    """A working folder with the files that the README's commands name."""
    rehearsal.make_work(tmp_path)
    monkeypatch.chdir(tmp_path)
    with rehearsal.rehearsing(home):
        yield tmp_path


def test_the_readme_has_commands_for_every_script():
    scripts = [words[0] for words in rehearsal.readme_commands()]
    assert {"prompts/make_geneval.py", "prompts/draw_prompts.py"} < set(scripts)
    assert len(scripts) >= 13 and set(scripts) == set(rehearsal.SMALL)
    words = ["--no-kl", "--filter-low"]
    assert rehearsal.readme_commands()[0] == ["train.py", *words]      # the main command


def test_all_commands_in_one_process(work, capsys):
    rows, scripts = {}, []
    for words, out in rehearsal.rehearse():
        scripts.append(words[0])
        said = capsys.readouterr().out
        if words[0] == "train.py" and "--resume" not in words:
            rows[out] = metrics(out)
            # where all advantages are 0, as of noise under GenEval's rule, there is no ratio
            assert [row["ratio_mean"] or row["adv_zero"] for row in rows[out]] == [1, 1]
            assert [row["taken"] for row in rows[out]] == [1, 1]
            assert (out / "samples/before_after.png").exists()
        elif words[0] == "train.py":
            assert metrics(out) == rows[out]
            assert [f.name for f in checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
        if words[0] == "reward.py":
            assert [line.split()[0] for line in said.splitlines() if " +- " in line] == [
                "reward", "clip", "hpsv2", "imagereward", "pickscore"]
        if words[0] == "fidelity":
            assert "frechet_inception_distance: " in said
    assert set(scripts) == set(rehearsal.SMALL)
    assert len(rows) == len([words for words in rehearsal.commands() if words[0] == "train.py"])
    n_prompts = len((work / "eval.jsonl").read_text().splitlines())
    assert read_json(work / "runs/after/summary.json")["images"] == n_prompts


def test_geneval_is_evaluated_on_a_slice_of_the_official_prompts(work):
    args = SimpleNamespace(model="showlab/show-o-512x512", reward="geneval", eval_reward=None,
                           prompts=work / "eval.jsonl", eval_prompts=None, eval_every=1)
    _, _, examples, _ = train.load_task(args, torch.device("cpu"))
    assert len(examples) == 62 and all(e in make_geneval.geneval_prompts() for e in examples)
    assert len({e["tag"] for e in examples}) == 6
