"""Every script beside the code runs, at its smallest size, and writes what it says.

Each runs in a process of its own, two at a time, started when the first test of this file asks.
"""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import ROOT
from PIL import Image

import train

EXPERIMENTS = ROOT / "results/experiments"
TINY = "steps=1 prompts_per_step=1 group_size=2 unmask_steps=2 eval_every=1 eval_n=1".split()


def start(*command):
    """Run a script of the repository to its end -> subprocess.CompletedProcess."""
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          cwd=ROOT, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that all scripts write to."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("report", "run", "prompts"):
        (folder / name).mkdir()
    for path in (*EXPERIMENTS.glob("*.json"), *EXPERIMENTS.glob("*.jsonl")):
        shutil.copy(path, folder / "report")
    return folder


@pytest.fixture(scope="module")
def jobs(out):
    """{name: future of a finished process}; those that take longest start first."""
    def bench(what, *more):
        return ("results/bench.py", what, "--size", "shapes", "--repeat", 1, "--group", 2,
                "--steps", 1, "--json", out / f"{what}.json", *more)
    commands = {
        "soak": ("results/soak.py", "--steps", 3, "--every", 1, "--after", 0,
                 "--json", out / "soak.json"),
        "speed": bench("speed", "--unmask-steps", 4),
        "run": ("results/experiments.py", "run", "filter", "--jobs", 1, "--seeds", 1,
                "--folder", out / "run", "--set", *TINY),
        "load": bench("load"),
        "memory": bench("memory", "--who", "ours", "--transition", "p1", "--unmask-steps", 4),
        "pretrain": ("shapes/pretrain.py", "--steps", 2, "--tokenizer-steps", 2, "--clip-steps", 1,
                     "--pool", 300, "--out", out / "base"),
        "curve": bench("curve"),
        "ladder": bench("ladder"),
        "report": ("results/experiments.py", "report", "--folder", out / "report"),
        "curves": ("results/curves.py", "--out", out / "curves.png"),
        "prompts": ("prompts/make_prompts.py", "--out", out / "prompts"),
    }
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(start, *command) for name, command in commands.items()}


def finish(jobs, name):
    """Wait for a script and check that it ended well -> its standard output."""
    done = jobs[name].result()
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers(jobs, out, name):
    """Return what a script wrote to its --json."""
    finish(jobs, name)
    return json.loads((out / f"{name}.json").read_text())


def script(path):
    """Import a script of the repository."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------- bench.py

def test_bench_speed(jobs, out):
    found = numbers(jobs, out, "speed")
    assert found["log_prob_relative_difference"] < 1e-4
    assert found["same_codes_as_plain"] == 1
    assert {"size", "device", "torch", "T", "G", "transition", "repeat", "images_per_s",
            "trajectory_steps_per_s", "tokens_per_s", "matmul_tflops", "share_of_matmul_rate",
            "floor_s", "seconds", "all_seconds"} < found.keys()
    assert found["rollout_ratio"] > 0 and found["update_ratio"] > 0
    peaks = found["update_peak_gb"]
    assert found["update_memory_ratio"] == peaks["ours"] / peaks["plain"] > 0


def test_bench_memory(jobs, out):
    found = numbers(jobs, out, "memory")
    assert found.keys() == {"update_peak_gb"} and found["update_peak_gb"].keys() == {"ours"}
    assert 0.1 < found["update_peak_gb"]["ours"] < 2


def test_bench_ladder(jobs, out):
    found = numbers(jobs, out, "ladder")
    assert (found["masked"], found["new"]) == (25, 4)
    assert len(found["forward_ms"]) == 5 and len(found["forward_and_backward_ms"]) == 3
    assert all(ms > 0 for name in ("forward_ms", "forward_and_backward_ms")
               for ms in found[name].values())


def test_bench_curve(jobs, out):
    rows = numbers(jobs, out, "curve")["rows"]
    assert len(rows) == 10
    for row in rows:
        share = row["rollout"] / (row["prompts"] * row["G"] * row["T"])
        assert row["rollout_per_image_and_iteration"] == share > 0
        assert row["update_per_image_and_iteration"] > 0


def test_bench_load(jobs, out):
    found = numbers(jobs, out, "load")
    assert found.keys() == {"safetensors as float32", "safetensors as bfloat16",
                            "bin as bfloat16", "decode_gb"}
    full = found.pop("safetensors as float32")["weights_gb"]
    assert found.pop("decode_gb") >= 0
    for row in found.values():
        assert row["weights_gb"] == full / 2
        assert row["ratio"] == pytest.approx(row["peak_gb"] / row["weights_gb"])


# ------------------------------------------------------------------------------- experiments.py

def test_the_report_is_the_one_that_is_there(jobs, out):
    finish(jobs, "report")
    assert (out / "report/README.md").read_text() == (EXPERIMENTS / "README.md").read_text()
    pictures = {path.name for path in EXPERIMENTS.glob("*.png")}
    assert {path.name for path in (out / "report").glob("*.png")} == pictures


def test_an_experiment_runs(jobs, out):
    finish(jobs, "run")
    lines = (out / "run/rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 3
    assert ["--filter-low" in row["flags"] for row in rows] == [False, True, True]
    for row in rows:
        assert row["flags"].startswith("--model shapes --reward clip:shapes/clip ")
        assert row["seed"] == 1 and [line["step"] for line in row["eval"]] == [0, 1]
        assert row["s_step"] > 0 and row["ratio_max"] == 1


def test_intervals_and_leads_are_those_of_a_known_table():
    """Student's t of two seeds is 12.71; leads are seed by seed."""
    experiments = script(ROOT / "results/experiments.py")

    def row(seed, score):
        return {"seed": seed, "eval": [{"overall": 0.5}, {"overall": score, "exact": score / 2}]}
    arms = {"a": [row(1, 0.6), row(2, 0.8)], "b": [row(2, 0.9), row(1, 0.7)], "c": [row(3, 0.4)]}
    lines = experiments.table(("exact",), arms)
    assert lines[0] == "| arm | overall | lead over the first | exact | seeds |"
    assert lines[2] == "| a | 0.700 ± 1.271 | - | 0.35 | 2 |"
    assert lines[3] == "| b | 0.800 ± 1.271 | +0.100 ± 0.000 | 0.4 | 2 |"
    assert lines[4] == "| c | 0.400 ± nan | - | 0.2 | 1 |"


def test_the_look_and_the_ceiling_are_written(tmp_path):
    experiments = script(ROOT / "results/experiments.py")
    args = SimpleNamespace(folder=tmp_path)
    experiments.look(args, B=6)
    rows = json.loads((tmp_path / "p1.json").read_text())
    assert [row["t"] for row in rows] == list(range(12)) and rows[-1]["remasked_positions"] == 0
    assert all(row["gradient_new"] > 0 > row["log_new"] for row in rows)
    experiments.ceiling(args, n=2)
    for row in json.loads((tmp_path / "ceiling.json").read_text()).values():
        for rule in ("overall", "exact"):
            assert 0 <= row[rule]["least"] <= row[rule]["share"] <= row[rule]["best"] <= 1
        assert row["exact"]["share"] <= row["overall"]["share"]


@pytest.mark.parametrize("flags, said", [
    (("--set", "steps"), "--set steps: must be NAME=VALUE"),
    (("--jobs", 0), "--jobs: 0 is out of range"),
    ((), "absent: no such folder")])
def test_bad_flags_of_the_experiments_are_one_line(flags, said, monkeypatch, capsys, tmp_path):
    experiments = script(ROOT / "results/experiments.py")
    command = ["experiments.py", "report", "--folder", tmp_path / "absent", *flags]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(SystemExit) as end:
        experiments.main()
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.count("\n") == 1 and said in errors


def test_rows_are_of_arms_and_train_takes_their_flags(monkeypatch):
    experiments = script(ROOT / "results/experiments.py")
    wanted = {(experiments.flags(arm), seed) for name, arms in experiments.EXPERIMENTS.items()
              for arm in arms.values() for seed in experiments.seeds_of(name)}
    assert experiments.runs_in(EXPERIMENTS).keys() <= wanted
    for line in {line for line, _ in wanted}:
        monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
        train.parse_args()


# ------------------------------------------------------------------------------------- the rest

def test_curves(jobs, out):
    finish(jobs, "curves")
    size = Image.open(out / "curves.png").size
    assert size == Image.open(ROOT / "results/curves.png").size


def test_soak(jobs, out):
    found = numbers(jobs, out, "soak")
    assert found["steps"] == 3 and found["rows"]
    assert all(len(row) == 5 and row[1] > 100 and row[2] > 2 for row in found["rows"])
    assert len(found["growth_after_0"]) == len(found["files_after_0"]) == 2


def test_the_prompt_files_are_what_their_generator_makes(jobs, out):
    finish(jobs, "prompts")
    for name in ("train.txt", "eval.txt"):
        assert (out / "prompts" / name).read_bytes() == (ROOT / "prompts" / name).read_bytes()
    texts = script(ROOT / "prompts/make_prompts.py").captions(5012, 0)
    assert not any(text.lower().startswith("a photo of") for text in texts)
    assert len(set(texts)) == 5012
    words = sorted(len(text.split()) for text in texts)
    assert words[250] <= 8 and words[-250] >= 30


def test_pretraining_writes_a_base_that_loads(jobs, out):
    from model import load_models
    printed = finish(jobs, "pretrain")
    assert "tokenizer     1/2 loss" in printed and "base     1/2 loss" in printed
    showo, magvit = load_models(str(out / "base"), vq=str(out / "base/magvitv2"))
    assert (showo.N, showo.K, len(magvit.quantize.embedding)) == (36, 256, 256)
    tokenizer = (out / "base/tokenizer.json").read_text()
    assert json.loads(tokenizer) == json.loads((ROOT / "shapes/tokenizer.json").read_text())
