"""Every script beside the code runs, at its smallest size, and writes what it says."""
import importlib
import json
import re
import sys
from types import SimpleNamespace

import experiments
import pytest
import speed
from helpers import ROOT
from PIL import Image

import train
from model import load_models
from prompts import make_prompts
from support.run import read_rows

TINY = ("steps=1 prompts_per_step=1 group_size=2 unmask_steps=2 eval_every=1 eval_n=1 "
        "eval_unmask_steps=2").split()


@pytest.fixture
def call(monkeypatch, capfd):
    """A function that runs main() of a script with flags, and returns what it printed."""
    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        importlib.import_module(name).main()
        return capfd.readouterr().out
    return run


SMALLEST = ("--size", "shapes", "--repeat", 1, "--steps", 1)


def bench(call, out, what, *flags):
    """Run bench.py at its smallest size -> the numbers that it wrote."""
    call("bench", what, *SMALLEST, "--json", out / "bench.json", *flags)
    return json.loads((out / "bench.json").read_text())


def test_bench_speed(call, tmp_path):
    found = bench(call, tmp_path, "speed")
    assert found["log_prob_relative_difference"] < 1e-4
    assert found["same_codes_as_plain"] == 1
    assert {"size", "device", "torch", "T", "G", "transition", "repeat", "matmul_tflops",
            "share_of_matmul_rate", "seconds"} < found.keys()
    assert found["rollout_ratio"] > 0 and found["update_ratio"] > 0
    peaks = found["update_peak_gb"]
    assert found["update_memory_ratio"] == peaks["ours"] / peaks["plain"]
    assert all(0.1 < peak < 2 for peak in peaks.values())


def test_plain_and_ours_are_equal_under_eq_14():
    bench = importlib.import_module("bench")
    showo, T, G = bench.random_showo("shapes", "cpu")
    traj = bench.random_trajectory(showo, G, T)
    assert bench.check_equal(showo, bench.random_prompt(showo), traj, T // 2, "p1") < 1e-4


def test_bench_load(call, tmp_path, monkeypatch):
    """In this process, for the time of it: peaks are not looked at."""
    monkeypatch.setattr(importlib.import_module("bench"), "in_own_process",
                        lambda function, *args: function(*args))
    found = bench(call, tmp_path, "load")
    assert found.keys() == {"safetensors as float32", "safetensors as bfloat16",
                            "bin as bfloat16", "decode_gb"}
    full = found.pop("safetensors as float32")["weights_gb"]
    assert found.pop("decode_gb") >= 0
    for row in found.values():
        assert row["weights_gb"] == full / 2
        assert row["ratio"] == pytest.approx(row["peak_gb"] / row["weights_gb"])


def test_the_page_of_speeds_is_that_of_the_files(call, tmp_path):
    call("speed", "--out", tmp_path / "speed.md")
    made = (tmp_path / "speed.md").read_text()
    assert made == (ROOT / "results/speed.md").read_text() and "[table " not in made


def test_a_card_that_ran_the_present_code_takes_the_place_of_the_earlier_ones(
        monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    found = {"card": {"name": "X", "tflops": 0.12345}, "p": {"a": True}}
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    assert speed.gpu() == ("| card |  |\n|---|---|\n| name | X |\n| tflops | 0.1235 |\n\n"
                           "| p |  |\n|---|---|\n| a | True |")


def test_an_experiment_runs_what_has_no_row_yet(call, monkeypatch, tmp_path):
    """Of "filter", the arm without the filter is there."""
    monkeypatch.setitem(experiments.DRAWN_WITH, "filter", (2,))
    tiny = dict(pair.split("=") for pair in TINY)
    off, on = (experiments.flags_of(arm | tiny)
               for arm in experiments.EXPERIMENTS["filter"].values())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"flags": off, "seed": 1}) + "\n")
    call("experiments", "run", "filter", "--jobs", 1, "--seeds", 1, "--folder", tmp_path,
         "--set", *TINY)
    _, row = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert "--filter-low" in row["flags"] and "--filter-low" not in off and row["flags"] == on
    assert on.startswith("--model shapes --reward clip:shapes/clip ")
    assert row["seed"] == 1 and [line["step"] for line in row["eval"]] == [0, 1]
    assert row["grad_norm"] > 0 and row["taken"] == 1 and 0 < row["drawn_with"]["2"] < 1
    assert "entropy" not in row["eval"][0] and 5 < row["eval"][1]["entropy"] < 6


def test_a_report_has_the_tables_of_what_was_run(call, tmp_path):
    rows = [{"flags": experiments.flags_of(arm), "seed": seed, "eval": [
                {"step": step, "overall": 0.5 + seed / 100, "geneval:exact": 0.25,
                 "clip:shapes/clip": 16.0, **dict.fromkeys(experiments.FAMILIES, 0.5),
                 **({"entropy": 5.4} if step else {})}
                for step in (0, 20)], **dict.fromkeys(experiments.MEANS, 1.0),
             "drawn_with": {"6": 0.4, "20": 0.7}}
            for name in ("kl", "long", "work", "work30")
            for arm in experiments.EXPERIMENTS[name].values() for seed in (3, 4)]
    slow = experiments.RATES["T 4"]["3e-4"]
    rows.append(rows[0] | {"flags": experiments.flags_of(slow), "seed": 1})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call("experiments", "report", "--folder", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| beta 0.01 | 0.535 ± 0.064 | +0.000 ± 0.000 | 0.25 | 16 | 1 | 2 |" in text
    assert "| KL 0.05 | 3 | 0.530 (step 0) | 0.530 (step 20) | 5.40, 5.40 |" in text
    assert re.search(r"\| T 4 \| .e-4 (\| 0.535 ± 0.064 ){4}\| \+0.000 ± 0.000 \| - \| 0.400 "
                     r"\| 0.700 \| 2 \|", text)
    assert "| T 4 | 0.530 (1) | - | - | - |" in text
    assert Image.open(tmp_path / "kl.png").size[0] == 780
    assert Image.open(tmp_path / "work.png").size[0] == 1100
    assert Image.open(tmp_path / "long.png").size[0] == 900


def test_the_work_of_a_run():
    """A step of the former first command is 1, of which the rollout is a quarter; scores lie on the
    lines between evaluations."""
    work = experiments.WORK
    assert experiments.work_of(work["T 12"]) == 1 == 3 * experiments.work_of(work["T 4"])
    assert experiments.work_of(work["T 12, loss on 6"]) == 0.25 + 0.75 / 2
    assert experiments.work_of(work["T 4, 64 pictures"]) == 1 / 6
    for arm in experiments.EXPERIMENTS["work"].values():
        assert experiments.work_of(arm) * arm["steps"] == pytest.approx(20, rel=0.02)
    row = {"eval": [{"step": 0, "overall": 0.5}, {"step": 30, "overall": 0.81}]}
    assert experiments.scores_at(5, "T 4", [row]) == pytest.approx([0.655])
    arms = {"T 4": [row | {"drawn_with": {"6": 0.4, "20": 0.7}}]}
    assert "| 0.810 | 0.810 | - | 9.7 | 0.400 |" in experiments.work_table(arms, (5, 10, 20, 30))


def test_scores_by_iterations(call, monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "score_of", lambda checkpoint, T, out: T / 100)
    printed = call("experiments", "iterations", "--ckpt", "x", "--folder", tmp_path)
    assert "| trained | 0.060 | 0.120 |" in printed
    assert json.loads((tmp_path / "iterations.json").read_text())["base"]["36"] == 0.36


def test_intervals_and_leads_are_those_of_a_known_table():
    """Student's t of two seeds is 12.71; leads are seed by seed."""

    def row(seed, score):
        return {"seed": seed, "eval": [{"overall": 0.5}, {"overall": score, "exact": score / 2}]}
    arms = {"a": [row(1, 0.6), row(2, 0.8)], "b": [row(2, 0.9), row(1, 0.7)], "c": [row(3, 0.4)]}
    lines = experiments.table(("exact",), arms).splitlines()
    assert lines[0] == "| arm | overall | lead over the first | exact | seeds |"
    assert lines[2] == "| a | 0.700 ± 1.271 | - | 0.35 | 2 |"
    assert lines[3] == "| b | 0.800 ± 1.271 | +0.100 ± 0.000 | 0.4 | 2 |"
    assert lines[4] == "| c | 0.400 | - | 0.2 | 1 |"


def test_the_look_and_the_ceiling_are_written(tmp_path):
    args = SimpleNamespace(folder=tmp_path)
    experiments.look(args, B=6)
    rows = json.loads((tmp_path / "p1.json").read_text())
    assert [row["t"] for row in rows] == list(range(12)) and rows[-1]["remasked_positions"] == 0
    assert all(row["gradient_new"] > 0 > row["log_new"] for row in rows)
    experiments.ceiling(args, n=2)
    for row in json.loads((tmp_path / "ceiling.json").read_text()).values():
        for rule in ("official", "exact"):
            assert 0 <= row[rule]["least"] <= row[rule]["share"] <= row[rule]["best"] <= 1
        assert row["exact"]["share"] <= row["official"]["share"]


# but for "lr", whose arms are those of "work" at other learning rates
ARMS = {experiments.flags_of(arm) for name, arms in experiments.EXPERIMENTS.items()
        for arm in arms.values() if name != "lr"}


@pytest.mark.parametrize("flags", sorted(ARMS))
def test_every_arm_takes_a_step(monkeypatch, tmp_path, flags):
    monkeypatch.setattr(sys, "argv", [
        "train.py", *flags.split(), "--steps", "1", "--prompts-per-step", "1", "--group-size", "2",
        "--eval-every", "0", "--out", str(tmp_path / "run")])
    train.main()
    row, = read_rows(tmp_path / "run/metrics.jsonl")
    assert row["taken"] == 1
    assert (row["ratio_max"] == 1 and row["grad_norm"] > 0) or row["adv_zero"] == 1


def test_curves(call, tmp_path):
    call("experiments", "curves", "--folder", tmp_path)
    size = Image.open(tmp_path / "curves.png").size
    assert size == Image.open(ROOT / "results/curves.png").size


def test_the_prompt_files_are_what_their_generator_makes(call, tmp_path):
    call("prompts.make_prompts", "--out", tmp_path)
    for name in ("train.txt", "eval.txt"):
        assert (tmp_path / name).read_bytes() == (ROOT / "prompts" / name).read_bytes()
    texts = make_prompts.captions(5012, 0)
    assert not any(text.lower().startswith("a photo of") for text in texts)
    assert len(set(texts)) == 5012
    words = sorted(len(text.split()) for text in texts)
    assert words[250] <= 8 and words[-250] >= 30


def test_pretraining_writes_a_base_that_loads(call, tmp_path):
    printed = call("shapes.pretrain", "--steps", 2, "--tokenizer-steps", 2, "--clip-steps", 1,
                   "--pool", 300, "--out", tmp_path)
    assert "tokenizer     1/2 loss" in printed and "base     1/2 loss" in printed
    showo, magvit = load_models(str(tmp_path), vq=str(tmp_path / "magvitv2"))
    assert (showo.N, showo.K, len(magvit.quantize.embedding)) == (36, 256, 256)
    tokenizer = (tmp_path / "tokenizer.json").read_text()
    assert json.loads(tokenizer) == json.loads((ROOT / "shapes/tokenizer.json").read_text())

    run = tmp_path / "run"
    call("train", "--model", tmp_path, "--vq", tmp_path / "magvitv2", "--no-kl", "--steps", 1,
         "--reward", f"clip:{tmp_path / 'clip'}", "--prompts-per-step", 2, "--group-size", 2,
         "--unmask-steps", 2, "--eval-every", 0, "--out", run)
    row, = read_rows(run / "metrics.jsonl")
    assert row["ratio_mean"] == 1 and row["taken"] == 1 and row["grad_norm"] > 0


def test_curves_of_runs(call, tmp_path):
    for seed in (1, 2):
        call("train", "--model", "shapes", "--no-kl", "--steps", 2, "--prompts-per-step", 1,
             "--group-size", 2, "--unmask-steps", 2, "--eval-every", 0, "--save-every", 0,
             "--seed", seed, "--out", tmp_path / str(seed))
    call("curves", tmp_path / "1", tmp_path / "2", "--out", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1100, 600)
    with pytest.raises(SystemExit):
        call("curves", tmp_path, "--out", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
