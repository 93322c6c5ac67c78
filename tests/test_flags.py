"""Flags whose defaults depend on the model."""
import re
import sys

import pytest
from helpers import call, refused, run

import eval_geneval
import reward
import sample
import train
from support import flags


def test_settings_of_the_sampler_depend_on_the_model(monkeypatch):
    def settings(*given):
        monkeypatch.setattr(sys, "argv", ["sample.py", *given])
        p = flags.parser("a script\n\nits commands\n\nmore")
        flags.add_model_flags(p.add_argument)
        flags.add_sampling_flags(p.add_argument)
        args = flags.parse(p, flags.SAMPLING)
        return {name: getattr(args, name) for name in flags.SAMPLING["showo"]}
    assert settings() == {"T": 50, "guidance": 5.0, "batch": 8, "temperature": 1.0, "n": 1}
    tiny = settings("--model", "shapes")
    assert tiny == {"T": 12, "guidance": 0.0, "batch": 256, "temperature": 1.0, "n": 1}
    given = settings("--steps", "3", "--cfg", "0", "--batch", "2", "--temperature", "0.5")
    assert given == {"T": 3, "guidance": 0, "batch": 2, "temperature": 0.5, "n": 1}


@pytest.mark.parametrize("script", [train, sample, eval_geneval, reward])
def test_help_has_commands_texts_and_each_default_once(monkeypatch, capsys, script):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        run(script, "--help")
    said = capsys.readouterr().out
    assert f"    python {script.__name__}.py --" in said or script is train
    assert "(default: None)" not in said and "local" not in said
    parts = re.split(r"\n  (?=-)", said.split("options:")[1])
    assert all(re.search(r"[a-z]{2}", re.sub(r"--?[\w-]+|[A-Z_]{2,}|\{.*?\}", "", part))
               for part in parts[1:])                                   # each flag has a text
    assert all(part.count("default: ") <= 1 for part in parts)
    if script is train:
        assert "(default: 625; shapes: 40)" in said and "torchrun --nproc_per_node 8" in said


@pytest.mark.parametrize("script, flags", [
    (sample, "--n 0"), (sample, "--steps 0"), (sample, "--batch -1"), (eval_geneval, "--n 0"),
    *((train, flags) for flags in (
        "--steps 0", "--group-size 1", "--prompts-per-step 0", "--unmask-steps 0", "--eval-n 0",
        "--micro-batch 0", "--keep-last -1", "--save-every -1", "--eval-every -1", "--warmup -1",
        "--max-grad-norm -1", "--lr -1", "--clip 0.2 0.28", "--clip 1.2 0.9"))])
def test_counts_are_counts_and_numbers_do_not_turn_a_run_round(script, flags):
    least = 2 if "group" in flags else 0 if "-1" in flags and script is train else 1
    wanted = "^--clip " if "clip" in flags else f"is less than {least}$"
    assert re.search(wanted, refused(script, "--model", "shapes", *flags.split()))


def test_a_checkpoint_of_shapes_has_the_defaults_of_shapes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    call("--steps", 1, "--out", "run")
    args = []
    for model in ("shapes", "run/checkpoint-1"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", model])
        args.append(vars(train.parse_args()) | {"model": None})
    assert args[0] == args[1]
    call("--steps", 1, "--model", "run/checkpoint-1", "--out", "again")
    run(sample, "--model", "run/checkpoint-1", "--prompt", "a star", "--out", "x.png")
    assert (tmp_path / "x.png").exists()
