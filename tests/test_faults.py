"""The faults that were found once, each with a test: writers of one folder, logits that are not
finite, reward servers, torchrun's processes, the order of checks, what a run says."""
import ast
import base64
import contextlib
import functools
import http.server
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import huggingface_hub.constants
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_fuzz import check, run_main, snapshot, write_lines

import checkpoint
import common
import reward
import sample
import shapes
import train
from checkpoint import InputError

FLAGS = ("--model shapes --no-kl --prompts-per-step 2 --group-size 2 --unmask-steps 2 "
         "--eval-every 0 --sample-every 0 --save-every 0").split()


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A working folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that runs main() under a command line: None when it works, else its one line."""
    return functools.partial(run_main, monkeypatch, capsys)


# ------------------------------------------------------------------------------ jobs

def start(*command, **environment):
    """Start a program as a user does; return its subprocess.Popen."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=environment,
                            start_new_session=True)


def end(job):
    """Return what a job printed and its lines of error, once it has ended."""
    try:
        said, errors = job.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)      # what it started and left behind
    return said, errors


def first_step(job, out):
    """Wait until a run has taken a step."""
    while not checkpoint.read_rows(out / "metrics.jsonl"):
        assert job.poll() is None, job.communicate()[1][-3000:]
        time.sleep(0.05)


def ours(errors):
    """Return the lines that train.py wrote itself; torchrun adds its own, with a traceback of
    torch's files, which may lie in a virtual environment in this folder."""
    traced = [line for line in errors.splitlines()
              if f'File "{ROOT}' in line and "site-packages" not in line]
    assert not traced, errors[-3000:]
    return [line for line in errors.splitlines() if re.match(r"(\[rank\d\]: ?)?train\.py:", line)]


# ------------------------------------------------------------------------------ 1: one writer

@pytest.fixture(scope="module")
def owner(tmp_path_factory):
    """A run of another process: its subprocess.Popen and its folder."""
    out = tmp_path_factory.mktemp("owner") / "run"
    job = start(ROOT / "train.py", *FLAGS, "--steps", 10 ** 6, "--save-every", 5, "--keep-last", 2,
                "--out", out)
    first_step(job, out)
    yield job, out
    job.kill()
    job.communicate()


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_a_second_writer_ends_at_once_and_names_the_first(call, owner, flags):
    job, out = owner
    said = call(train.main, *FLAGS, "--steps", 10 ** 6, "--out", out, *flags)
    check(said, "another run is there")
    assert f'"pid": {job.pid}' in said and str(out) in said
    assert job.poll() is None
    n_before = len(checkpoint.read_rows(out / "metrics.jsonl"))
    while len(checkpoint.read_rows(out / "metrics.jsonl")) <= n_before:     # it goes on
        assert job.poll() is None
        time.sleep(0.02)


def test_the_lock_of_a_killed_owner_is_taken_over(call, owner, tmp_path):
    job, out = owner
    while not checkpoint.checkpoints(out):
        assert job.poll() is None
        time.sleep(0.02)
    job.kill()
    job.wait()
    assert f'"pid": {job.pid}' in (out / "lock.json").read_text()
    last = checkpoint.step_of(checkpoint.checkpoints(out)[-1])
    check(call(train.main, *FLAGS, "--steps", last + 1, "--resume", "--out", out), None)
    rows = [row["step"] for row in checkpoint.read_rows(out / "metrics.jsonl")]
    assert rows == list(range(1, last + 2))
    assert not (out / "lock.json").read_text()          # given back


def test_the_lock_of_another_host_is_never_taken(call, tmp_path):
    check(call(train.main, *FLAGS, "--steps", 1, "--out", "run"), None)
    lock = tmp_path / "run/lock.json"
    lock.write_text(json.dumps({"host": f"not-{socket.gethostname()}", "pid": 1}))
    before = lock.read_text(), snapshot(tmp_path)
    for flags in ((), ("--resume",)):
        said = call(train.main, *FLAGS, "--steps", 2, "--out", "run", *flags)
        check(said, "if it has ended, delete run/lock.json")
    assert (lock.read_text(), snapshot(tmp_path)) == before
    lock.unlink()
    check(call(train.main, *FLAGS, "--steps", 2, "--out", "run", "--resume"), None)


# ------------------------------------------------------------------------------ 2: not finite

def logits_of(kind, codes, K=8):
    """Return logits in which something is not finite."""
    logits = torch.zeros(*codes.shape, K)
    if kind == "nan in one row":
        logits[0] = torch.nan
    elif kind == "one inf":
        logits[:, 0, 3] = torch.inf
    else:
        logits[:] = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}[kind]
    return logits


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "nan in one row", "one inf"])
def test_a_rollout_of_logits_that_are_not_finite_ends(kind):
    traj = sample.rollout(functools.partial(logits_of, kind), 2, 4, 8, 3,
                          generator=torch.Generator().manual_seed(0))
    assert traj.codes.min() >= 0 and traj.codes.max() < 8
    assert traj.threshold.isnan().any(1).tolist() == [True, kind != "nan in one row"]


def test_a_policy_that_diverges_is_not_saved_and_the_run_can_go_back(call, tmp_path):
    run = tmp_path / "run"
    # enough pictures that some rewards differ, so that there is a gradient
    flags = (*FLAGS, "--prompts-per-step", 8, "--group-size", 4)
    check(call(train.main, *flags, "--steps", 1, "--out", run), None)
    wild = (*flags, "--steps", 8, "--lr", 1e10, "--max-bad-steps", 3, "--resume", "--out", run)
    check(call(train.main, *wild), "checkpoint-1 is whole: go back with --resume and a smaller")
    rows = checkpoint.read_rows(run / "metrics.jsonl")
    assert sum(row["skipped"] for row in rows) == 3 and len(rows[-1]["bad_prompts"]) == 8
    assert [folder.name for folder in checkpoint.checkpoints(run)] == ["checkpoint-1"]
    state = load_file(run / "checkpoint-1/pytorch_model.safetensors")
    assert all(weight.isfinite().all() for weight in state.values())

    check(call(train.main, *flags, "--steps", 3, "--resume", "--out", run), None)
    assert [row["skipped"] for row in checkpoint.read_rows(run / "metrics.jsonl")] == [0, 0, 0]


# ------------------------------------------------------------------------------ 4: GenEval

@pytest.fixture
def another_model(tmp_path, monkeypatch):
    """Flags of a model that is not shapes by name; shapes' detector judges its GenEval reward."""
    folder = tmp_path / "other"
    ignore = shutil.ignore_patterns("magvitv2", "clip", "*.py")
    shutil.copytree(ROOT / "shapes", folder, ignore=ignore)
    config = checkpoint.read_json(folder / "config.json") | {"llm_model_path": "microsoft/phi-1_5"}
    checkpoint.write_json(folder / "config.json", config)

    def make_reward(spec, *, detector=None, **how):
        return reward.make_reward(spec, detector=detector or shapes.detect, **how)
    monkeypatch.setattr(train, "make_reward", make_reward)
    return [*FLAGS, "--model", folder, "--vq", "shapes/magvitv2", "--steps", 1]


def coco(**changes):
    """Return a line whose class the detectors of both worlds could name."""
    line = {"tag": "single_object", "include": [{"class": "cow", "count": 1}],
            "prompt": "a photo of a cow"}
    return line | changes


def test_geneval_as_a_reward_says_at_the_start_what_lacks_metadata(
        call, another_model, tmp_path, monkeypatch):
    lines = write_lines(tmp_path / "p.jsonl", [coco()])
    plain = tmp_path / "plain.txt"
    plain.write_text("a cow\n")
    monkeypatch.setattr(train, "load_models", not_called)
    flags = (*another_model, "--reward", "geneval", "--eval-every", 1, "--out", "run")
    check(call(train.main, *flags, "--prompts", plain), "plain.txt: prompt 1 lacks GenEval")
    check(call(train.main, *flags, "--prompts", lines, "--eval-prompts", plain),
          "--eval-prompts")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("evaluated", ["metadata", "default", "plain"])
def test_geneval_as_a_reward_draws_its_grids(call, another_model, tmp_path, evaluated):
    """Step 0 once ended here: the prompts of the grid have no metadata."""
    lines = write_lines(tmp_path / "p.jsonl", [coco()])
    plain = tmp_path / "plain.txt"
    plain.write_text("a cow\n")
    flags = [*another_model, "--reward", "geneval", "--sample-every", 1, "--eval-n", 1,
             "--eval-unmask-steps", 1, "--prompts", lines, "--out", "run"]
    flags += {"metadata": ["--eval-prompts", lines], "default": [],
              "plain": ["--eval-prompts", plain]}[evaluated]
    if evaluated != "plain":
        flags += ["--eval-every", 1]
    check(call(train.main, *flags), None)
    assert (tmp_path / "run/samples/step-000001.png").exists()
    rows = checkpoint.read_rows(tmp_path / "run/eval.jsonl")
    assert len(rows) == (0 if evaluated == "plain" else 2)


# ------------------------------------------------------------------------------ 5, 6: servers

class Server(http.server.ThreadingHTTPServer):
    """A reward server; answer(handler) writes what a request gets."""
    daemon_threads = True

    def __init__(self, answer, port):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.headers, self.done = answer, [], threading.Event()
        self.finished = False
        self.url = f"http://127.0.0.1:{self.server_port}/score"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        """Say nothing when the other side has gone."""

    def stop(self):
        self.done.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.headers.append(dict(self.headers))
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.answer(self)

    def do_GET(self):
        self.server.headers.append(dict(self.headers))
        reply(self, b'{"scores": [1, 2]}')

    def log_message(self, *_):
        """Write no log."""


@pytest.fixture
def serve():
    """A function that starts a Server; all are stopped at the end."""
    servers = []

    def started(answer, port=0):
        servers.append(Server(answer, port))
        return servers[-1]
    yield started
    for server in servers:
        server.stop()


def reply(handler, body, status=200, **headers):
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": len(body)}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def scores(handler):
    """Answer as a good server does: a number for each picture."""
    numbers = [float(i % 2) for i in range(len(handler.body["images"]))]
    reply(handler, json.dumps({"scores": numbers}).encode())


def ask(url, **how):
    """Return the scores of two pictures."""
    judge = reward.HttpReward(url, **{"timeout": 20.0, "patience": 0.0, **how})
    values, _ = judge(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a", "b"], None)
    return values


NOT_SCORES = 'its answer is not {"scores": [number, ...]}'
ANSWERS = {
    "an object": (b'{"scores": {"0": 1, "1": 2}}', NOT_SCORES),
    "text": (b'{"scores": "12"}', NOT_SCORES),
    "texts": (b'{"scores": ["1", "2"]}', NOT_SCORES),
    "true and false": (b'{"scores": [true, false]}', NOT_SCORES),
    "lists": (b'{"scores": [[1], [2]]}', NOT_SCORES),
    "null": (b'{"scores": null}', NOT_SCORES),
    "a number": (b'{"scores": 5}', NOT_SCORES),
    "no scores": (b'{"score": [1, 2]}', NOT_SCORES),
    "a list on top": (b"[1, 2]", NOT_SCORES),
    "too few": (b'{"scores": [1]}', "has 1 scores for 2 pictures"),
    "none": (b'{"scores": []}', "has 0 scores for 2 pictures"),
    "too many": (b'{"scores": [1, 2, 3]}', "has 3 scores for 2 pictures"),
    "401 digits": (b'{"scores": [1, ' + b"9" * 401 + b"]}", "a number that no float can hold"),
    "5,000 digits": (b'{"scores": [1, ' + b"9" * 5_000 + b"]}", "its answer is not JSON"),
    "deep": (b"[" * 100_000, "its answer is not JSON"),
    "not UTF-8": (b'{"scores": [1, 2], "x": "\xff"}', "its answer is not JSON"),
    "cut": (b'{"scores": [1,', "its answer is not JSON"),
    "HTML": (b"<html>", "its answer is not JSON"),
    "nothing": (b"", "its answer is not JSON")}


@pytest.mark.parametrize("body, message", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_of_another_form_is_refused(serve, body, message):
    server = serve(lambda handler: reply(handler, body))
    with pytest.raises(InputError, match=re.escape(message)):
        ask(server.url, patience=30.0)
    assert len(server.headers) == 1         # not asked again


def test_an_answer_of_the_right_form_is_taken(serve):
    server = serve(lambda handler: reply(handler, b'{"scores": [-1, 2.5e-3], "more": {}}'))
    assert ask(server.url).tolist() == pytest.approx([-1, 2.5e-3])
    server = serve(lambda handler: reply(handler, b'{"scores": [null, 1e308]}'))
    assert ask(server.url).isnan().tolist() == [True, False]


def drip(handler, text):
    """Write a text byte by byte, too slowly, but not for ever; note when all of it was taken."""
    for byte in text:
        if handler.server.done.wait(0.1):
            return
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
    handler.server.finished = True


def slow_body(handler):
    handler.send_response(200)
    handler.end_headers()
    drip(handler, b'{"scores": [1, 2]' + b" " * 60 + b"}")


def slow_headers(handler):
    drip(handler, b"HTTP/1.0 200 OK\r\nX-Pad: " + b"x" * 60)
    handler.wfile.write(b'\r\n\r\n{"scores": [1, 2]}')


def no_answer(handler):
    if not handler.server.done.wait(8):
        scores(handler)
        handler.server.finished = True


@pytest.mark.parametrize("answer", [slow_body, slow_headers, no_answer])
def test_the_timeout_is_that_of_the_whole_answer(serve, answer):
    server = serve(answer)
    with pytest.raises(InputError, match="fast enough for 0.4 s"):
        ask(server.url, timeout=0.4)
    assert not server.finished              # given up in the middle of it


def endless(handler):
    """Write more than a client may read."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"scores": [1, 2], "more": "')
    for _ in range(40):
        handler.wfile.write(b"0" * 2 ** 20)
    handler.wfile.write(b'"}')


def test_an_endless_answer_is_not_read_to_its_end(serve):
    server = serve(endless)
    with pytest.raises(InputError, match="its answer is over 16 MB"):
        ask(server.url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(serve, status):
    elsewhere = serve(scores)
    server = serve(lambda handler: reply(handler, b"", status, Location=elsewhere.url))
    with pytest.raises(InputError, match=f"no scores .*{status}"):
        ask(server.url.replace("//", "//name:secret@"), patience=30.0)
    assert elsewhere.headers == [] and len(server.headers) == 1


def garbage(handler):
    handler.wfile.write(b"\xff\xfe not HTTP at all\r\n\r\n")


def closed(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def fails(handler, status=500):
    reply(handler, b"no", status)


@pytest.mark.parametrize("answer", [garbage, closed, fails])
def test_a_server_that_fails_is_named_in_one_line(serve, answer):
    server = serve(answer)
    with pytest.raises(InputError) as refusal:
        ask(server.url)
    assert str(refusal.value).startswith(f"--reward {server.url}: no scores")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_server_that_refuses_is_not_asked_again(serve, status):
    server = serve(functools.partial(fails, status=status))
    with pytest.raises(InputError, match=str(status)):
        ask(server.url, patience=30.0)
    assert len(server.headers) == 1


@pytest.mark.parametrize("fault", [fails, closed, garbage])
def test_a_server_that_is_away_for_a_moment_is_asked_again(serve, monkeypatch, fault):
    monkeypatch.setattr(reward.time, "sleep", lambda seconds: None)
    answers = [fault, fault, scores]
    server = serve(lambda handler: answers.pop(0)(handler))
    assert ask(server.url, patience=30.0).tolist() == [0, 1]
    assert len(server.headers) == 3


def test_a_server_that_starts_late_is_waited_for(serve, monkeypatch):
    with socket.socket() as held:           # a port at which nobody listens
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            serve(scores, port)
    monkeypatch.setattr(reward.time, "sleep", sleep)
    assert ask(f"http://127.0.0.1:{port}/score", patience=30.0).tolist() == [0, 1]
    assert len(waits) == 2 and waits[0] < waits[1]


def test_credentials_are_sent_and_shown_nowhere(serve, monkeypatch, capsys, tmp_path):
    password, sent = "pass%3Aw%40rd", base64.b64encode(b"name:pass:w@rd").decode()
    server = serve(scores)
    spec = f"http:{server.url.replace('//', f'//name:{password}@')}:0.5"
    for flags in ((), ("--resume",)):
        steps = 2 if flags else 1
        monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--steps", str(steps), "--out",
                                          "run", "--reward", spec, *flags])
        train.main()
    assert {headers["Authorization"] for headers in server.headers} == {f"Basic {sent}"}

    server.answer = fails
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--steps", "3", "--reward-patience", "0"])
    with pytest.raises(SystemExit):
        common.run(train.main)
    said = capsys.readouterr()
    files = [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file()]
    assert server.url in said.out and server.url in said.err and len(files) > 8
    for text in (said.out, said.err, *files):
        for secret in (password, "pass:w@rd", "w@rd", sent):
            assert secret not in text


def test_when_patience_ends_the_run_saves_and_says_how_to_go_on(call, serve, tmp_path):
    answers = [scores, scores]

    def twice(handler):
        answer = answers.pop(0) if answers else fails
        answer(handler)
    server = serve(twice)
    flags = (*FLAGS, "--steps", 5, "--out", "run", "--reward", f"http:{server.url}",
             "--reward-patience", 0)
    said = call(train.main, *flags)
    check(said, "no scores (HTTP Error 500")
    assert "saved: run/checkpoint-3, continue with --resume --out run" in said
    rows = checkpoint.read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1]

    server.answer = scores
    check(call(train.main, *flags, "--resume"), None)
    rows = checkpoint.read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and rows[4]["skipped"] == 0


# ------------------------------------------------------------------------------ 7: torchrun

def test_a_fault_of_all_processes_is_one_line(tmp_path):
    hub = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    job = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                ROOT / "train.py", "--no-kl", "--filter-low", "--out", tmp_path / "run", **hub)
    _, errors = end(job)
    line, = ours(errors)
    assert job.returncode != 0 and len(line) < 700
    assert "hf download showlab/show-o-512x512" in line


def test_a_bad_flag_of_all_processes_is_said_by_the_first(monkeypatch, capsys):
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--group-size", "1"])
        with pytest.raises(SystemExit) as stopped:
            train.main()
        assert stopped.value.code == 2
        said.append(capsys.readouterr().err)
    assert "--group-size: 1 is out of range" in said[0] and said[0].count("\n") == 1
    assert said[1] == ""


# ------------------------------------------------------------------------------ 8, 12: metadata

@pytest.mark.parametrize("tag", ["step", "overall"])
def test_a_tag_that_is_a_column_of_eval_jsonl_is_refused(call, another_model, serve, tmp_path, tag):
    """Also where the reward needs no metadata, so that none is looked at."""
    lines = write_lines(tmp_path / "p.jsonl", [coco(tag=tag)])
    flags = (*another_model, "--reward", f"http:{serve(scores).url}", "--eval-every", 1,
             "--eval-n", 1, "--eval-unmask-steps", 1, "--eval-prompts", lines, "--out", "run")
    check(call(train.main, *flags), f"the tag {tag!r}")


@pytest.mark.parametrize("tag", [["a", "b"], {"a": 1}])
def test_a_tag_that_is_no_text_is_refused(call, another_model, serve, tmp_path, tag):
    lines = write_lines(tmp_path / "p.jsonl", [coco(tag=tag)])
    flags = (*another_model, "--reward", f"http:{serve(scores).url}", "--eval-every", 1,
             "--eval-n", 1, "--eval-unmask-steps", 1, "--eval-prompts", lines, "--out", "run")
    check(call(train.main, *flags), "p.jsonl: line 1 has the tag")


@pytest.mark.parametrize("clause, unknown", [
    ({"class": "unicorn", "count": 1}, "unicorn"),
    ({"class": "cow", "count": 1, "color": "mauve"}, "mauve")])
def test_what_no_detector_knows_is_named_at_the_start(
        call, another_model, tmp_path, monkeypatch, clause, unknown):
    lines = write_lines(tmp_path / "p.jsonl", [coco(), coco(include=[clause])])
    monkeypatch.setattr(train, "make_reward", not_called)
    check(call(train.main, *another_model, "--reward", "geneval", "--prompts", lines, "--out",
               "run"), f"p.jsonl: prompt 2: the detector does not know {unknown}")


# ------------------------------------------------------------------------------ 9: damage

@pytest.mark.parametrize("name", ["trainer.pt", "pytorch_model.safetensors"])
def test_a_damaged_checkpoint_is_passed_over(monkeypatch, capsys, tmp_path, name):
    run = tmp_path / "run"
    flags = ["train.py", *FLAGS, "--save-every", "1", "--out", str(run)]
    monkeypatch.setattr(sys, "argv", [*flags, "--steps", "2"])
    train.main()
    (run / "checkpoint-2" / name).write_bytes(b"[" * 100_000)
    monkeypatch.setattr(sys, "argv", [*flags, "--steps", "2", "--resume"])
    train.main()
    assert "passing over checkpoint-2" in capsys.readouterr().err
    assert [row["step"] for row in checkpoint.read_rows(run / "metrics.jsonl")] == [1, 2]
    assert (run / "checkpoint-2.replaced").is_dir()

    # none is whole: nothing is touched
    for folder in checkpoint.checkpoints(run):
        (folder / name).write_bytes(b"")
    before = snapshot(run)
    with pytest.raises(SystemExit) as stopped:
        common.run(train.main)
    assert stopped.value.code == 2
    *passed, line = capsys.readouterr().err.splitlines()
    assert len(passed) == 2 and "no checkpoint" in line and "is whole" in line
    assert snapshot(run) == before


# ------------------------------------------------------------------------------ 10: the tiny base

def load_script(path, monkeypatch):
    """Return a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("steps, warmup", [(1, 0.05), (2, 0.05), (10, 0.1), (20, 0.05),
                                           (40, 0.05)])
def test_a_schedule_of_few_steps_is_finite(monkeypatch, steps, warmup):
    pretrain = load_script(ROOT / "shapes/pretrain.py", monkeypatch)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = pretrain.one_cycle(optimizer, 1.0, steps, warmup)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert all(0 <= rate <= 1 for rate in rates) and max(rates) > 0


# ------------------------------------------------------------------------------ 11: shapes

@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 4, 7), (2, 5, 8), (1, 4, 8), (2, 4), (8,)])
def test_a_policy_of_another_shape_is_refused(shape):
    message = re.escape(f"shape {list(shape)}") + ".*" + re.escape("[2, 4, 8]")
    with pytest.raises(ValueError, match=message):
        sample.rollout(lambda codes: torch.zeros(shape), 2, 4, 8, 3,
                       generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------ 13: resumes

def test_resumes_leave_no_files_behind(call, tmp_path):
    run = tmp_path / "run"
    flags = (*FLAGS, "--save-every", 1, "--sample-every", 1, "--eval-every", 2, "--eval-n", 1,
             "--eval-unmask-steps", 1, "--out", run)
    check(call(train.main, *flags, "--steps", 2), None)
    first = {path.name for path in run.iterdir()}
    rows = checkpoint.read_rows(run / "metrics.jsonl")
    for _ in range(3):
        check(call(train.main, *flags, "--steps", 2, "--resume", run / "checkpoint-1"), None)
        again = checkpoint.read_rows(run / "metrics.jsonl")
        assert [row["step"] for row in again] == [1, 2] and again[0] == rows[0]
        assert {path.name for path in run.iterdir()} == first | {"checkpoint-2.replaced"}
    assert sorted(path.name for path in (run / "samples").glob("step-*.png")) == [
        "step-000000.png", "step-000001.png", "step-000002.png"]


# ------------------------------------------------------------------------------ frictions

def not_called(*_, **__):
    pytest.fail("too early")


@pytest.mark.parametrize("flags, message", [
    (("--model", "/nope"), "/nope: no such file or folder"),
    (("--model", "nobody/nothing"), "hf download nobody/nothing"),
    (("--ckpt", "/nope"), "/nope: no such file or folder"),
    (("--prompts", "/nope.txt"), "--prompts /nope.txt: cannot be read"),
    (("--resume", "/nope"), "/nope: no checkpoint of train.py")])
def test_what_is_missing_is_said_before_a_reward_is_built(call, monkeypatch, flags, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(train, "make_reward", not_called)
    check(call(train.main, *FLAGS, "--steps", 1, "--out", "run", *flags), message)


def test_training_starts_from_other_weights(call, tmp_path):
    state = load_file(ROOT / "shapes/pytorch_model.safetensors")
    state = {name: weight * 0.5 for name, weight in state.items()}
    save_file(state, tmp_path / "w.safetensors")
    check(call(train.main, *FLAGS, "--steps", 1, "--lr", 0, "--ckpt", "w.safetensors", "--out",
               "run"), None)
    saved = load_file(tmp_path / "run/checkpoint-1/pytorch_model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)


def test_a_checkpoint_of_shapes_has_the_defaults_of_shapes(call, monkeypatch, tmp_path):
    check(call(train.main, *FLAGS, "--steps", 1, "--out", "run"), None)
    args = {}
    for model in ("shapes", "run/checkpoint-1"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", model])
        args[model] = vars(train.parse_args()) | {"model": None}
    assert args["shapes"] == args["run/checkpoint-1"]
    check(call(train.main, *FLAGS, "--model", "run/checkpoint-1", "--steps", 1, "--out", "again"),
          None)
    check(call(sample.main, "--model", "run/checkpoint-1", "--prompt", "a star", "--out", "x.png"),
          None)


def steps_said(monkeypatch, capsys, *flags):
    """Return the lines that a run prints for its steps."""
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--out", "run", *map(str, flags)])
    train.main()
    said = capsys.readouterr().out
    return [line for line in said.splitlines() if re.match(r"\s*\d+/\d+ \|", line)]


def test_what_was_not_computed_is_a_dash(serve, monkeypatch, capsys):
    def equal(handler):
        count = len(handler.body["images"])
        reply(handler, json.dumps({"scores": [0.5] * count}).encode())
    line, = steps_said(monkeypatch, capsys, "--steps", 1, "--reward", f"http:{serve(equal).url}")
    assert "zero-adv 1.00" in line and "entropy - " in line and "grad - " in line


def test_what_was_computed_is_a_number(serve, monkeypatch, capsys):
    line, = steps_said(monkeypatch, capsys, "--steps", 1, "--reward", f"http:{serve(scores).url}")
    assert re.search(r"grad \d+\.\d\d entropy \d+\.\d\d", line)


@pytest.mark.parametrize("load, threads, said", [(3.0, 2, True), (0.1, 2, False), (3.0, 1, False)])
def test_busy_cores_are_noticed(monkeypatch, capsys, load, threads, said):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--steps", "1", "--out", "run"])
    train.main()
    assert ("OMP_NUM_THREADS=1" in capsys.readouterr().out) == said


def test_the_upper_half_of_sample_needs_torch_alone():
    tree = ast.parse((ROOT / "sample.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"math", "dataclasses", "torch"}


def test_captions_begin_with_the_score(monkeypatch, call):
    captions = []

    def grid(images, texts, columns):
        captions.extend(texts)
        return plain(images, texts, columns)
    plain = common.grid
    monkeypatch.setattr(common, "grid", grid)
    check(call(train.main, *FLAGS, "--steps", 1, "--sample-every", 1, "--eval-unmask-steps", 1,
               "--out", "run"), None)
    assert len(captions) > 12
    assert all(re.match(r"[01] \| a photo of", caption) for caption in captions)


def test_reward_py_takes_the_exact_detector(monkeypatch, capsys, tmp_path):
    lines = shapes.prompts("eval")[:4]
    for i, line in enumerate(lines):
        image, _ = shapes.render(line, random.Random(i))
        common.to_pil(image).save(tmp_path / f"{i}.png")
    write_lines(tmp_path / "p.jsonl", lines)
    monkeypatch.setattr(sys, "argv", ["reward.py", "--reward", "geneval", "--detector", "shapes",
                                      "--images", str(tmp_path), "--prompts", "p.jsonl"])
    reward.main()
    assert re.search(r"geneval\s+1\.0000", capsys.readouterr().out)
