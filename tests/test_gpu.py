"""The scripts on a pretended GPU (pretend_gpu.py): devices, nccl's rules, waits of the host, types.

Started by it, test_gpu.py OUT goes through the scripts in one process, or under torchrun through
those of several; what it leaves in OUT is looked at by the tests."""
import ast
import collections
import functools
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import rehearsal
import torch
from helpers import ROOT, metrics, serving, together
from helpers import run as call
from safetensors.torch import load_file
from test_reward import Judge

import eval_geneval
import model
import reward
import sample
import train
from model import PHI_1_5, load_magvit, load_showo
from prompts import make_geneval
from sample import Trajectory, transition_log_prob
from shapes import world
from support import processes

# of fewer pictures, or with a reward of 0 or 1, all advantages can be 0
FLAGS = ("--model shapes --reward geneval:partial --filter-low --steps 2 --prompts-per-step 3 "
         "--group-size 8 --unmask-steps 4 --loss-steps 2 --micro-batch 24 --no-compile "
         "--eval-every 0 --eval-n 1 --eval-unmask-steps 2 --save-every 1").split()


PRETEND = ROOT / "tools/pretend_gpu.py"


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder that the script leaves, in one process."""
    out = tmp_path_factory.mktemp("one")
    together(PRETEND, __file__, out, n=1)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that the script leaves, in two processes."""
    out = tmp_path_factory.mktemp("two")
    together(PRETEND, __file__, out)
    return out


def found(one, name):
    """Return what the script wrote down."""
    return json.loads((one / f"{name}.json").read_text())


def test_training_runs_on_a_gpu(one):
    """With a KL, Eq. 14, two epochs and checkpointing; then resumed."""
    rows = metrics(one / "kl")
    assert len(rows) == 2 and rows == metrics(one / "kl-again")
    assert all(row["taken"] == 1 and row["grad_norm"] > 0 for row in rows)
    ours, again = (load_file(one / run / "checkpoint-2/pytorch_model.safetensors")
                   for run in ("kl", "kl-again"))
    assert all(torch.equal(again[name], weight) for name, weight in ours.items())


@pytest.mark.parametrize("run", ["plain", "lora"])
def test_ratio_and_kl_are_exact_at_the_first_step_in_bf16(one, run):
    """Against a reference whose projections are held in bf16, and one without adapters."""
    first = metrics(one / run)[0]
    assert first["ratio_mean"] == first["ratio_max"] == 1 and first["kl_ref"] == 0
    assert first["grad_norm"] > 0 and first["adv_zero"] < 1


def test_the_host_does_not_wait_inside_the_loops_over_t(one):
    waits = found(one, "waits")
    assert waits["planted in rollout"] == {"test_gpu.py item": 8}
    for run in ("kl", "plain"):
        assert waits[run]["inside"] == {} and waits[run]["outside"] > 10


def test_bf16_gradients_are_near_those_of_float32_with_and_without_checkpointing(one):
    plain, checkpointed = found(one, "gradients")
    assert 0 < plain["to float32"] < 2e-2 and checkpointed["logits"] == plain["logits"] > 0
    # weights cast inside of blocks have gradients that are rounded later
    assert 0 < checkpointed["to float32"] < 2e-2


def test_attention_takes_what_the_fast_kernels_take(one):
    """No mask and bf16 for one prompt: flash attention's rules. Else a mask in bf16 that is one row
    for all queries and heads, its rows at multiples of 8: that of memory-efficient attention."""
    calls = found(one, "attention")
    assert calls["image"] and calls["unequal"]
    assert PHI_1_5["hidden_size"] // PHI_1_5["num_attention_heads"] == 64
    for given in [*calls["image"], *calls["unequal"]]:
        assert given["dtypes"] == ["torch.bfloat16"] * 3 and given["last_stride"] == 1
        assert given["head_dim"] % 8 == 0 and given["head_dim"] <= 256
    assert all(given["mask"] is None for given in calls["image"])
    for given in calls["unequal"]:
        dtype, strides, size, rows = given["mask"]
        assert dtype == "torch.bfloat16" and strides[-1] == 1
        assert all(stride % 8 == 0 for stride in strides[:-1]) and strides[2] == 0
        assert size == rows * strides[0]


def test_the_decoder_keeps_one_layout(one):
    """On a GPU NCHW, which its GroupNorm makes of all; on a CPU NHWC."""
    assert found(one, "layouts") == ["mid.attn_1.proj_out"]     # once, at the lowest resolution
    magvit = load_magvit(ROOT / "shapes/magvitv2")
    assert layouts(magvit, torch.channels_last) == ["post_quant_conv"]      # the first one


def test_pictures_and_geneval(one):
    assert len(list((one / "pictures").glob("*.png"))) == 4
    assert found(one, "geneval/summary")["images"] > 0


def test_every_reward_scores_pictures_of_a_gpu(one):
    scores = found(one, "rewards")
    assert scores.keys() == {"clip", "hpsv2", "pickscore", "imagereward", "geneval", "http"}
    for values in scores.values():
        on_gpu, on_cpu = torch.tensor(values)
        assert on_gpu.isfinite().all()
        torch.testing.assert_close(on_gpu, on_cpu, atol=2e-2, rtol=1e-2)    # half against float32


def test_the_check_for_a_card_runs_whole(one):
    found_there = found(one, "gpu_check")
    assert len(found_there["holds"]) == 8 and all(found_there["holds"].values())
    for part in ("rollout", "p2", "p1", "p2 --grad-checkpoint", "a step of 2 x 6"):
        assert all(value > 0 for name, value in found_there[part].items()
                   if name.startswith(("seconds", "share", "ratio", "update"))), part


def test_two_processes_by_nccls_rules(two):
    """Sharded and not."""
    plain, zero = (metrics(two / run) for run in ("plain", "zero"))
    assert len(plain) == 2 and plain[0] == zero[0]
    states = [load_file(two / run / "checkpoint-2/pytorch_model.safetensors")
              for run in ("plain", "zero")]
    for name, weight in states[1].items():
        assert (weight - states[0][name]).norm() <= 1e-3 * states[0][name].norm()
    assert len(list((two / "pictures").glob("*.png"))) == 3
    # AdamW is fused on a GPU without shards: what the run wants counts, not what its file says
    for run, fused in (("then-zero", False), ("then-plain", True)):
        assert [row["taken"] for row in metrics(two / run)] == [1, 1]
        state = torch.load(two / run / "checkpoint-2/optimizer.pt", "cpu", weights_only=True)
        assert state["param_groups"][0]["fused"] is (fused or None)


def test_a_dropped_move_to_the_gpu_is_caught(one):
    said = found(one, "dropped")
    assert re.search(r"Expected all tensors to be on the same device.*\[model.py:\d+\]", said)


def loop_lines(file, function):
    """Return the lines of the loop over t in a function."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            loop, = (n for n in ast.walk(node)
                     if isinstance(n, ast.For) and getattr(n.target, "id", "") == "t")
            return range(loop.body[0].lineno, loop.end_lineno + 1)


def waits_since(before):
    """Return what made the host wait since a Counter was copied: inside the loops over t of rollout
    and update, {line: n}, and how often elsewhere."""
    import pretend_gpu
    inside = {f"{file}:{line}" for file, function in (("sample.py", "rollout"),
                                                      ("train.py", "update"))
              for line in loop_lines(file, function)}
    found, outside = collections.Counter(), 0
    for (what, stack), n in (pretend_gpu.waits - before).items():
        if inside & set(stack):
            found[f"{stack[-1].split(':')[0]} {what}"] += n
        else:
            outside += n
    return {"inside": dict(found), "outside": outside}


def planted_wait():
    """Return what waits_since() finds in a rollout whose policy asks for a number."""
    import pretend_gpu
    before = pretend_gpu.waits.copy()

    def policy(codes):
        assert codes.sum().item() > 0
        return torch.zeros(*codes.shape, 4, device=codes.device)
    sample.rollout(policy, 2, 16, 4, 8, generator=torch.Generator("cuda"))
    return {name.replace("_local_scalar_dense.default", "item"): n
            for name, n in waits_since(before)["inside"].items()}


def dropped_move(out):
    """Return the error of train.py's main where the prompts' move to the GPU is left out."""
    plain, names, move = model.Showo.encode, vars(model).copy(), "Prompt(ids.to(self.device), "
    source = textwrap.dedent(inspect.getsource(plain))
    assert source.count(move) == 1
    exec(compile(source.replace(move, "Prompt(ids, "), model.__file__, "exec"), names)
    model.Showo.encode = names["encode"]
    try:
        call(train, *FLAGS, "--out", out / "dropped-move")
    except (RuntimeError, SystemExit) as error:
        return str(error)
    finally:
        model.Showo.encode = plain


def layouts(magvit, wanted=torch.contiguous_format):
    """Return the decoder's layers that get or give a tensor of another memory layout."""
    others = set()
    for name, module in magvit.decoder.named_modules():
        def look(module, args, out, name=name):
            if not all(x.is_contiguous(memory_format=wanted) for x in (*args, out)):
                others.add(name)
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm):
            module.register_forward_hook(look)
    device = magvit.quantize.embedding.device
    magvit.decode(torch.zeros(2, 16, dtype=torch.long, device=device))
    return sorted(others)


def attention_calls():
    """Return what scaled_dot_product_attention is given by an update's passes of one prompt, and by
    a rollout's of prompts of unequal length."""
    plain, calls = torch.nn.functional.scaled_dot_product_attention, []

    def seen(query, key, value, mask=None):
        about = mask
        if mask is not None:
            storage = mask.untyped_storage().nbytes() // mask.element_size()
            about = [str(mask.dtype), mask.stride(), storage, len(mask)]
        calls.append({"dtypes": [str(x.dtype) for x in (query, key, value)], "mask": about,
                      "head_dim": query.shape[-1], "last_stride": query.stride(-1)})
        return plain(query, key, value, mask)
    showo = load_showo(ROOT / "shapes", device="cuda")
    showo.compute_in(torch.bfloat16)
    torch.nn.functional.scaled_dot_product_attention = seen
    codes = torch.full((2, showo.N), showo.K, device="cuda")
    texts = ["a photo of a red circle", "a photo of two stars and a blue moon"]
    with showo.shared_text(showo.encode(texts[:1]).repeat(2)) as text:
        calls.clear()           # the text's own pass
        showo.logits(codes, text)
    image = list(calls)
    policy = showo.policy(showo.encode(texts))
    calls.clear()
    policy(codes)
    torch.nn.functional.scaled_dot_product_attention = plain
    return {"image": image, "unequal": calls}


def distances_of_gradients(checkpointing):
    """Return relative distances of logits and gradients in bf16 from those in float32."""
    outcomes = []
    for dtype in (torch.bfloat16, torch.float32):
        showo = load_showo(ROOT / "shapes", device="cuda")
        showo.compute_in(dtype)
        showo.grad_checkpoint = checkpointing and dtype == torch.bfloat16
        g = torch.Generator("cuda").manual_seed(0)
        codes = torch.randint(showo.K, (8, showo.N), generator=g, device="cuda")
        order = torch.arange(showo.N, device="cuda").expand(8, -1) % 4
        traj = Trajectory(codes, order, None, showo.K)
        prompt = showo.encode(["a photo of a red circle", "a photo of two stars"]).repeat(4)
        with showo.shared_text(prompt) as text:
            for t in range(4):
                logits = showo.logits(traj.state(t), text)
                logp = transition_log_prob(logits, traj, t, "p2")
                (logp * torch.arange(-4.0, 4, device="cuda")).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in showo.parameters()])
        outcomes.append((logits.detach(), gradient))
    (logits, gradient), (exact_logits, exact) = outcomes
    return {"logits": ((logits - exact_logits).norm() / exact_logits.norm()).item(),
            "to float32": ((gradient - exact).norm() / exact.norm()).item()}


def scores():
    """Return the scores of each reward's tiny model on the GPU and on the CPU."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    prompts = ["a cat", "a photo of a dog", ""]
    examples, found = make_geneval.geneval_prompts()[::180][:3], {}
    with serving(Judge) as server:
        server.seen, server.answers = [], []
        for spec in ("clip", "hpsv2", "pickscore", "imagereward", "geneval:partial",
                     f"http:http://127.0.0.1:{server.server_port}"):
            name = spec.split(":")[0]
            found[name] = []
            for device in ("cuda", "cpu"):
                judge = reward.make_reward(spec, device=device)
                values = judge(images.to(device), prompts, examples)
                found[name].append(values.tolist())
    return found


def few_prompts(out):
    """Write a ninth of the held-out prompts; return the flag that takes them."""
    path = out / "few.jsonl"
    if processes.rank() == 0:
        path.write_text("".join(json.dumps(x) + "\n" for x in world.prompts("eval")[::9]))
    processes.barrier()
    return ["--eval-prompts", path]


def drop_last(run, other):
    """Copy a run without its second checkpoint."""
    if processes.rank() == 0:
        shutil.copytree(run, other, ignore=lambda *_: ["checkpoint-2"])
    processes.barrier()
    return other


def main_of_one(out):
    """Go through the scripts in one process."""
    import bench
    import gpu_check
    import pretend_gpu
    waits = {"planted in rollout": planted_wait()}

    def training(name, *flags, run=None):
        before = pretend_gpu.waits.copy()
        call(train, *FLAGS, "--out", run or out / name, *flags)
        waits[name] = waits_since(before)
    kl = ("--kl", "--transition", "p1", "--ratio", "mean", "--lr", 1e-5, "--inner-epochs", 2,
          "--grad-checkpoint", "--eval-every", 2, *few_prompts(out))
    training("kl", *kl)
    training("again", *kl, "--resume", run=drop_last(out / "kl", out / "kl-again"))
    training("plain", "--steps", 1, "--kl")
    training("lora", "--steps", 1, "--kl", "--lora", 4)
    training("float32", "--steps", 1, "--no-kl", "--dtype", "fp32", "--transition", "ar")

    call(sample, "--model", "shapes", "--prompt", "a photo of a red circle", "--prompt",
         "a photo of two stars", "--n", 2, "--cfg", 1, "--steps", 3, "--no-compile", "--out",
         out / "pictures")
    home, work = out / "home", out / "work"
    work.mkdir()
    rehearsal.make_hub(home)
    rehearsal.make_work(work)
    with rehearsal.rehearsing(home):
        found = {"rewards": scores()}
        call(eval_geneval, "--steps", 2, "--n", 1, "--prompts", work / "eval.jsonl",
             "--no-compile", "--out", out / "geneval")
    # two layers, pictures by twos
    bench.random_showo = functools.partial(bench.random_showo, num_hidden_layers=2)
    bench.matmul_rate = functools.partial(bench.matmul_rate, seconds=0.1)
    gpu_check.G = 2
    call(gpu_check, "--size", "shapes", "--no-compile", "--json", out / "gpu_check.json")

    magvit = load_magvit("shapes/magvitv2", device="cuda")
    found |= {"waits": waits, "dropped": dropped_move(out), "attention": attention_calls(),
              "layouts": layouts(magvit),
              "gradients": [distances_of_gradients(on) for on in (False, True)]}
    for name, value in found.items():
        (out / f"{name}.json").write_text(json.dumps(value))


def main_of_two(out):
    """Go through what two processes do."""
    place = processes.setup()
    processes.setup = lambda device: place
    flags = [*FLAGS, "--prompts-per-step", 2, "--unmask-steps", 2, "--no-kl"]
    call(train, *flags, "--out", out / "plain")
    call(train, *flags, "--out", out / "zero", "--zero")
    call(train, *flags, "--out", drop_last(out / "plain", out / "then-zero"), "--resume", "--zero")
    call(train, *flags, "--out", drop_last(out / "zero", out / "then-plain"), "--resume")
    call(sample, "--model", "shapes", "--prompt", "a photo of a red circle",
         "--prompt", "a photo of two stars", "--prompt", "a photo of a cat", "--steps", 2,
         "--no-compile", "--out", out / "pictures")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        main_of_two(Path(sys.argv[1]))
    else:
        main_of_one(Path(sys.argv[1]))
