"""Flags whose defaults depend on the model."""
import argparse
import sys

from helpers import call, run

import sample
import train


def test_settings_of_the_sampler_depend_on_the_model(monkeypatch):
    def settings(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
        p = argparse.ArgumentParser()
        flags.add_model_flags(p.add_argument)
        flags.add_sampling_flags(p)
        args = p.parse_args()
        return {name: getattr(args, name) for name in flags.SAMPLING}
    assert settings() == {"T": 50, "guidance": 5.0, "batch": 8, "temperature": 1.0}
    tiny = settings("--model", "shapes")
    assert tiny == {"T": 12, "guidance": 0.0, "batch": 256, "temperature": 1.0}
    given = settings("--steps", "3", "--cfg", "0", "--batch", "2", "--temperature", "0.5")
    assert given == {"T": 3, "guidance": 0, "batch": 2, "temperature": 0.5}


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
