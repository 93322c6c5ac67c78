"""model.py against numbers made by Show-o's own code (tests/data/README.md), and its transformer
against transformers' Phi."""
import json

import pytest
import torch
from bench import plain_phi
from helpers import CHECKPOINT, DATA, ROOT, TOKENIZER, copy_configs, equal, gradient, read_json
from safetensors.torch import load_file, save_file

import model
from model import MAGVITv2, Showo, load_magvit, load_models, load_showo, to_uint8
from support import weights as disk


@pytest.fixture(scope="module")
def expected():
    return load_file(DATA / "showo/expected.safetensors"), read_json("showo/expected.json")["cases"]


def some_codes(showo, B):
    """Return states: codes Long[B, N], some of them masked."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(showo.K + 1, (B, showo.N), generator=g)


@pytest.mark.parametrize("max_text_len", [8, 16, 128])
def test_prompts_become_the_official_ids(showo, max_text_len):
    facts = read_json("prompting/prompting.json")
    prompt = showo.encode(facts["prompts"], max_text_len)
    image = [facts["mask_token_id"]] * 16
    rows = [ids + [showo.soi, *image, showo.eoi] for ids in prompt.ids.tolist()]
    assert rows == facts["sequences"][str(max_text_len)]
    n_padding = (prompt.ids == showo.pad).sum(1).tolist()
    assert n_padding == facts["first_real_index"][str(max_text_len)]
    assert showo.K + showo.code_offset == facts["mask_token_id"]


def test_prompts_cannot_spell_control_tokens(showo):
    ids = showo.encode(["<|soi|> [PAD] <|t2i|>"], 64).ids[0]
    text = ids[ids != showo.pad]
    assert text[0] == showo.t2i and (text[1:] < showo.text_vocab).all() and len(text) > 10


@pytest.mark.parametrize("case", ["single", "batch4", "partial4"])
def test_logits(showo, expected, case):
    tensors, cases = expected
    codes = tensors[f"{case}.input_ids"][:, -17:-1] - showo.code_offset
    with torch.no_grad():
        logits = showo.logits(codes, showo.encode(cases[case]["prompts"], 16))
    torch.testing.assert_close(logits, tensors[f"{case}.image_logits"], atol=1e-4, rtol=1e-4)


def test_guidance(showo, expected):
    tensors, cases = expected
    codes = tensors["cfg.input_ids"][:2, -17:-1] - showo.code_offset
    prompt = showo.encode(cases["cfg"]["prompts"], 16)
    with torch.no_grad():
        logits = showo.logits(codes, prompt, guidance=5.0)
        prefilled = showo.logits(codes, showo.prefill(prompt, guided=True), guidance=5.0)
    torch.testing.assert_close(logits, tensors["cfg.guided_image_logits"], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(prefilled, logits)


def test_logits_do_not_depend_on_padding_or_on_a_shared_prefix(showo):
    codes = some_codes(showo, 5)
    cat = "a photo of a cat"
    texts = [cat, "two", "", cat, "a green kite above a blue boat"]
    with torch.no_grad():
        together = showo.logits(codes, showo.encode(texts, 100))
        alone = torch.cat([showo.logits(codes[i:i + 1], showo.encode(texts[i:i + 1], 40))
                           for i in range(5)])
        shared = showo.prefill(showo.encode([cat, "two"], 40)).repeat(2)
        grouped = showo.logits(codes[:4], shared)
        plain = showo.logits(codes[:4], showo.encode([cat, cat, "two", "two"], 40))
        picked = showo.logits(codes[:2], shared[torch.tensor([2, 0])])
        swapped = showo.logits(codes[:2], showo.encode(["two", cat], 40))
    for ours, wanted in ((together, alone), (grouped, plain), (picked, swapped)):
        torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="5 rows of codes, 4 rows of prompts"):
        showo.logits(codes, shared)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("masked", ["some", "all"])
def test_logits_at_some_positions_are_those_of_all(showo, masked, guidance):
    codes = some_codes(showo, 4) if masked == "some" else torch.full((4, 16), showo.K)
    prompt = showo.encode(["a red cat", "two"]).repeat(2)
    at = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:5]
                      for i in range(4)])
    with torch.no_grad():
        whole = showo.logits(codes, prompt, guidance=guidance)
        some = showo.logits(codes, prompt, guidance=guidance, positions=at)
    wanted = whole.gather(1, at[..., None].expand(-1, -1, showo.K))
    torch.testing.assert_close(some, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("state", ["partly masked", "first"])
def test_a_shared_prefix_has_the_logits_and_gradients_of_separate_ones(showo, state):
    """The first state, all masked, is computed once for all rows of a prompt."""
    codes = some_codes(showo, 4) if state != "first" else torch.full((4, 16), showo.K)
    weights = torch.randn(4, 16, showo.K, generator=torch.Generator().manual_seed(1))
    logits, gradients = [], []
    for prompt in (showo.encode(["a red cat", "two"]).repeat(2),
                   showo.encode(["a red cat", "a red cat", "two", "two"])):
        logits.append(showo.logits(codes, prompt))
        ((logits[-1] + weights).square()).mean().backward()     # other ones in each row
        gradients.append(gradient(showo))
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert gradients[0].norm() > 0


def test_the_gradient_of_a_shared_text_is_that_of_plain_logits(showo):
    """Three backward passes through one pass of the text, against three whole ones."""
    states = [torch.full((4, 16), showo.K), *some_codes(showo, 8).split(4)]
    prompt = showo.encode(["a red cat", "two"]).repeat(2)
    for codes in states:
        showo.logits(codes, prompt).square().mean().backward()
    wanted = gradient(showo)

    with showo.shared_text(prompt) as text:
        for codes in states:
            showo.logits(codes, text).square().mean().backward()
    shared = gradient(showo)
    assert (shared - wanted).norm() < 1e-5 * wanted.norm()
    torch.testing.assert_close(shared, wanted, atol=1e-6, rtol=1e-4)


def test_a_shared_text_that_nothing_used_has_no_gradient(showo):
    with showo.shared_text(showo.encode(["two"])):
        pass
    assert all(p.grad is None for p in showo.parameters())


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("n_masked", [[16, 16, 16], [5, 5, 5], [5, 9, 16], [1, 1, 1]])
def test_the_policy_gives_the_logits_of_masked_positions(showo, n_masked, guidance):
    """Also where rows have different numbers of them."""
    codes, g = some_codes(showo, 3) % showo.K, torch.Generator().manual_seed(2)
    for row, n in zip(codes, n_masked, strict=True):
        row[torch.randperm(16, generator=g)[:n]] = showo.K
    prompt = showo.encode(["a red cat", "", "two"])
    with torch.no_grad():
        ours = showo.policy(prompt, guidance)(codes)
        wanted = showo.logits(codes, prompt, guidance=guidance)
    masked = codes == showo.K
    assert ours.shape == wanted.shape == (3, 16, showo.K)
    torch.testing.assert_close(ours[masked], wanted[masked], atol=2e-5, rtol=1e-5)


def plain_logits(phi, showo, codes, prompt):
    """Return the logits of Show-o's padded row under transformers' Phi, in one pass with a mask."""
    ids = prompt.ids[prompt.row]
    column = torch.ones_like(codes[:, :1])
    ids = torch.cat([ids, column * showo.soi, codes + showo.code_offset, column * showo.eoi], 1)
    n_text, i = prompt.ids.shape[1], torch.arange(ids.shape[1])
    image = (i[:, None] >= n_text) & (i >= n_text)
    sees = ((i[:, None] >= i) | image) & (ids != showo.pad)[:, None] | (i[:, None] == i)
    mask = torch.where(sees, 0.0, -1e9)[:, None]
    logits = phi(input_ids=ids, attention_mask=mask, position_ids=i[None]).logits
    return logits[:, -showo.N - 1:-1, showo.code_offset:-1]


@pytest.mark.parametrize("texts", [["a red cat"] * 4, ["a red cat", "two", "", "a green kite"]])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_block_is_transformers_phi(base, texts, checkpointed):
    """Logits and all gradients, with q/k norms, partial rotary embeddings, padding, positions."""
    showo = load_showo("shapes")
    phi, prompt = plain_phi(showo), showo.encode(texts)
    codes = some_codes(showo, 4)
    at = torch.stack([torch.randperm(36, generator=torch.Generator().manual_seed(i))[:7]
                      for i in range(4)])
    weights = torch.randn(4, 7, showo.K, generator=torch.Generator().manual_seed(1))
    showo.grad_checkpoint = checkpointed
    ours = showo.logits(codes, prompt, positions=at)
    plain = plain_logits(phi, showo, codes, prompt)
    plain = plain.gather(1, at[..., None].expand(-1, -1, showo.K))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)

    for logits in (ours, plain):
        (logits.log_softmax(-1) * weights).mean().backward()
    wanted = {f"showo.{name}": p.grad for name, p in phi.named_parameters()}
    for name, p in showo.named_parameters():
        assert (p.grad - wanted[name]).norm() <= 1e-5 * max(wanted[name].norm(), 1e-3), name


def logits_and_gradient(model, prompt, codes, at):
    with model.shared_text(prompt) as text:
        logits = model.logits(codes, text, positions=at)
        logits.log_softmax(-1)[..., 3].mean().backward()
    return logits.detach(), gradient(model)


def test_a_compiled_block_computes_the_same():
    showo = load_showo("shapes")
    del showo.showo.model["layers"][1:]         # one layer, so that one graph is compiled
    codes, prompt = some_codes(showo, 4), showo.encode(["a photo of two stars"]).repeat(4)
    at = torch.arange(7).expand(4, 7)
    plain = logits_and_gradient(showo, prompt, codes, at)
    showo.compiled = True
    torch._dynamo.utils.counters.clear()
    compiled = logits_and_gradient(showo, prompt, codes, at)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(compiled[0], plain[0], atol=1e-5, rtol=1e-5)
    assert (compiled[1] - plain[1]).norm() < 1e-5 * plain[1].norm()
    names = set(showo.state_dict())
    assert names < set(load_showo("shapes").state_dict()) and not any("orig" in n for n in names)


@pytest.mark.parametrize("settings", [{}, {"lora": 2}])
def test_blocks_compile_once(monkeypatch, settings):
    """A graph for all layers, and one for the last layer's positions; none for other numbers of
    rows, of positions, or lengths of text; one more each for padding, and without gradients."""
    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # inductor takes minutes; what the compiler's later parts assume is seen by one of the settings
    once = torch.compile(model.block, backend="eager" if settings else "aot_eager")
    monkeypatch.setattr(model, "compiled_block", lambda: once)
    torch._dynamo.config.recompile_limit = 64
    showo = load_showo("shapes")
    showo.compiled, showo.grad_checkpoint = True, "grad_checkpoint" in settings
    if "lora" in settings:
        showo.add_lora(2)
    # with adapters the first layer's input has no gradient: a graph of its own
    n, first = 3 if "lora" in settings else 2, ["a photo of two stars"]
    far = ["a photo of a red circle left of a moon"]
    padded, other = [*far, *first], [*far, "a photo of a red moon"]
    for texts, B, M, new in ((first, 6, 7, n), (far, 4, 36, 0), (first, 3, 1, 0), (first, 1, 5, 0),
                             (padded, 4, 5, n), (other, 6, 8, 0)):
        codes, before = some_codes(showo, B), graphs()
        prompt, at = showo.encode(texts).repeat(B // len(texts)), torch.arange(M).expand(B, M)
        logits_and_gradient(showo, prompt, codes, at)
        assert graphs() - before == new, (texts, B, M)
    for texts, B, new in ((first, 6, 2), (far, 5, 0), (padded, 8, 2), (other, 4, 0)):
        before = graphs()
        with torch.no_grad():           # rollouts, evaluation with guidance
            policy = showo.policy(showo.encode(texts).repeat(B // len(texts)), guidance=2.0)
            policy(some_codes(showo, B))
        assert graphs() - before == new, (texts, B)


def test_cast_weights_add_their_gradients_to_the_float32_ones(showo):
    """bf16 products: over three passes the gradient stays near the one of float32."""
    prompt, gradients = showo.encode(["a red cat", "two"]), []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_showo(CHECKPOINT, tokenizer=TOKENIZER)
        model.dtype = dtype
        with model.shared_text(prompt) as text:
            for codes in some_codes(showo, 6).split(2):
                model.logits(codes, text).log_softmax(-1)[..., 5].mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        gradients.append(gradient(model))
    assert 0 < (gradients[1] - gradients[0]).norm() < 3e-2 * gradients[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision(showo, expected, dtype):
    """Products in bf16, the weights in bf16 or float32."""
    tensors, cases = expected
    half = load_showo(CHECKPOINT, tokenizer=TOKENIZER, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    half.dtype = torch.bfloat16

    for case in ("single", "batch4", "partial4"):
        codes = tensors[f"{case}.input_ids"][:, -17:-1] - showo.code_offset
        wanted = tensors[f"{case}.image_logits"]
        with torch.no_grad():
            logits = half.logits(codes, half.encode(cases[case]["prompts"], 16))
        assert logits.dtype == torch.float32 and not torch.equal(logits, wanted)
        assert (logits - wanted).norm() < 2e-2 * wanted.norm()
        assert (logits - wanted).abs().max() < 2e-2 * wanted.abs().max()

    codes = tensors["cfg.input_ids"][:2, -17:-1] - showo.code_offset
    wanted = tensors["cfg.guided_image_logits"]
    with torch.no_grad():  # guidance 5 amplifies the errors of its two halves
        guided = half.logits(codes, half.encode(cases["cfg"]["prompts"], 16), guidance=5.0)
    assert (guided - wanted).norm() < 3e-2 * wanted.norm()


def test_frozen_projections_in_half_precision_change_no_logit(showo):
    """compute_in() holds them as autocast would cast them in each pass; what is saved stays
    float32."""
    trained, frozen, adapted = (load_showo(CHECKPOINT, tokenizer=TOKENIZER) for _ in range(3))
    trained.compute_in(torch.bfloat16)
    frozen.requires_grad_(False).compute_in(torch.bfloat16)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    halves = {name.split(".")[-2] for name, p in frozen.named_parameters()
              if p.dtype == torch.bfloat16}
    assert halves == {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}
    codes, prompt = some_codes(showo, 2), showo.encode(["a red cat", "two"], 16)
    with torch.no_grad():
        assert torch.equal(frozen.logits(codes, prompt), trained.logits(codes, prompt))

    adapted.add_lora(2)
    adapted.compute_in(torch.bfloat16)
    with torch.no_grad():       # adapters begin as 0
        assert torch.equal(adapted.logits(codes, prompt), trained.logits(codes, prompt))
    saved = adapted.merged_state()
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    for name, weight in trained.state_dict().items():
        assert (saved[name] - weight).norm() <= 4e-3 * weight.norm()


def test_a_policy_with_adapters_off_is_the_base():
    showo, plain = load_showo("shapes"), load_showo("shapes")
    showo.add_lora(2)
    assert set(showo.trainable()) == {name for name, _ in showo.named_parameters()
                                      if name.endswith(("lora_A", "lora_B"))}
    for name, p in showo.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    codes = torch.full((2, showo.N), showo.K)
    prompt = showo.encode(["a photo of a moon", "a photo of two stars"])
    with torch.no_grad():
        on, base = (model.logits(codes, prompt) for model in (showo, plain))
        with showo.frozen_base():
            off = showo.logits(codes, prompt)
        merged = load_showo("shapes")
        merged.load_state_dict(showo.merged_state())
        torch.testing.assert_close(merged.logits(codes, prompt), on, atol=1e-4, rtol=1e-4)
    assert torch.equal(off, base) and not torch.allclose(on, base, atol=1e-2)


def test_save_writes_what_show_o_wrote(showo, tmp_path):
    showo.save(tmp_path)
    ours, theirs = (load_file(folder / "pytorch_model.safetensors")
                    for folder in (tmp_path, CHECKPOINT))
    assert equal(ours, theirs) and all(ours[name].dtype == theirs[name].dtype for name in ours)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == read_json("showo/checkpoint/config.json")
    # who may read the one may read the other
    config, model = (tmp_path / name for name in ("config.json", "pytorch_model.safetensors"))
    assert config.stat().st_mode == model.stat().st_mode


def test_the_tokenizer_s_files_are_such_as_transformers_4_reads(tmp_path, base):
    base[0].save(tmp_path)
    for folder in (ROOT / "shapes", tmp_path):
        kind = disk.read_json(folder / "tokenizer_config.json")["tokenizer_class"]
        assert kind == "PreTrainedTokenizerFast"


def test_a_codebook_need_not_be_a_power_of_two(showo, tmp_path):
    config = showo.config | {"codebook_size": 48, "vocab_size": 320 + 10 + 48 + 1,
                             "mask_token_id": 320 + 10 + 48}
    torch.manual_seed(0)
    model = Showo(config, showo.phi, showo.tokenizer)
    model.save(tmp_path)
    again = load_showo(tmp_path)
    codes = torch.randint(49, (2, 16))
    with torch.no_grad():
        logits = again.logits(codes, again.encode(["two", ""]))
        assert torch.equal(logits, model.eval().logits(codes, model.encode(["two", ""])))
    assert again.K == 48 and logits.shape == (2, 16, 48)

    with pytest.raises(SystemExit, match="--vq shapes/magvitv2: its codebook is not of the model's "
                       "size, 48"):
        load_models(tmp_path, vq="shapes/magvitv2")
    with pytest.raises(AssertionError, match="vocabulary"):         # codes would be shifted
        Showo(config | {"llm_vocab_size": 319}, showo.phi, showo.tokenizer)


def test_the_projector_of_the_clip_variant_is_left_out(showo, tmp_path):
    extra = {f"mm_projector.{i}.{kind}": torch.zeros(4)
             for i in (0, 2) for kind in ("weight", "bias")}
    official = read_json("showo/showo_512_manifest.json")
    with_clip, without = (official[f"w_clip_vit_{kind}"]["tensors"].keys()
                          for kind in ("true", "false"))
    assert with_clip - without == extra.keys()

    copy_configs(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(showo.config | {"w_clip_vit": True}))
    save_file(dict(showo.state_dict()) | extra, tmp_path / "pytorch_model.safetensors")
    model = load_showo(tmp_path, tokenizer=TOKENIZER)
    assert model.config == showo.config
    assert model.state_dict().keys() == showo.state_dict().keys()


def test_settings_that_the_block_does_not_know_are_refused(showo):
    for phi in ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"hidden_act": "relu"}):
        with pytest.raises(AssertionError, match="Phi"):
            Showo(showo.config, showo.phi | phi, None)


def test_full_size_modules_have_the_official_names_and_shapes():
    config = dict(vocab_size=58498, llm_vocab_size=50295, codebook_size=8192, num_vq_tokens=1024)
    with torch.device("meta"):
        models = Showo(config, {}, None), MAGVITv2()
    manifests = (read_json("showo/showo_512_manifest.json")["w_clip_vit_false"],
                 read_json("magvit/magvitv2_manifest.json"))
    for module, manifest in zip(models, manifests, strict=True):
        shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        official = {name: entry["shape"] for name, entry in manifest["tensors"].items()}
        assert shapes == official


def test_magvit():
    model, expected = load_magvit(DATA / "magvit"), load_file(DATA / "magvit/expected.safetensors")
    close = dict(atol=1e-4, rtol=1e-4)
    indices, wanted = expected["decode.indices"], expected["decode.pixels"]
    with torch.no_grad():
        hidden = model.encoder(expected["encode.pixels"])
        pixels = model.decode(indices)
        rectangle = model.decode(expected["decode_rect.indices"], (4, 6))
        many = model.decode(indices.repeat(17, 1))          # 34 x 64 codes: three chunks
    torch.testing.assert_close(hidden, expected["encode.hidden"], **close)
    assert torch.equal(model.encode(expected["encode.pixels"]), expected["encode.indices"])
    assert torch.equal(model.quantize.embedding, expected["codebook.entries"])
    torch.testing.assert_close(pixels, wanted, **close)
    torch.testing.assert_close(rectangle, expected["decode_rect.pixels"], **close)
    torch.testing.assert_close(many, wanted.repeat(17, 1, 1, 1), **close)

    difference = to_uint8(pixels).permute(0, 2, 3, 1).int() - expected["decode.uint8"].int()
    assert difference.abs().max() <= 1
    with pytest.raises(RuntimeError, match="24"):       # no square
        model.decode(expected["decode_rect.indices"])


def test_magvit_is_saved_and_loaded_again(tmp_path):
    model = load_magvit(DATA / "magvit")
    model.save(tmp_path)
    again = load_magvit(tmp_path)
    assert again.config == model.config and equal(again.state_dict(), model.state_dict())
