"""DHSA inside transformers models: equal to their own attention at a budget that holds every key; refusals."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    masking_utils,
)

from dhsa_ext import hf
from dhsa_ext.config import DHSAConfig

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"]
# Each model with the attention of its own that DHSA must equal.
MODELS = {
    "gemma2": (  # soft-capped logits, windows that alternate with global layers
        lambda: Gemma2ForCausalLM(
            Gemma2Config(
                **SMALL, num_hidden_layers=4, head_dim=16, sliding_window=12, attn_logit_softcapping=5.0,
                query_pre_attn_scalar=16, layer_types=ALTERNATING * 2,
            )
        ),
        "eager",
    ),
    "gemma3": (
        lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **SMALL, num_hidden_layers=4, head_dim=16, sliding_window=12, query_pre_attn_scalar=16,
                layer_types=ALTERNATING * 2,
            )
        ),
        "sdpa",
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=2)), "sdpa"),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_hidden_layers=2)), "sdpa"),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_hidden_layers=2, head_dim=16)), "sdpa"),
}  # fmt: skip
SETTINGS = dict(q_block=16, sink=4, local=8, min_length=0)
PADDINGS = ("none", "left", "right")


@pytest.fixture(autouse=True)
def registered():
    hf.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: on a busy machine, threads that wait for one another take minutes
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def build(name: str, config: DHSAConfig | None = None, seed: int = 0):
    torch.manual_seed(seed)
    make, own = MODELS[name]
    model = make().eval()
    if config is not None:
        hf.configure(model, config)
    return model, own


def prompts(padding: str, batch: int = 3, length: int = 40, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 97, (batch, length), generator=g)
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch if padding != "none" else 0):
        pads = 5 * row  # fewer than the windows: a query that sees only padding has no answer to compare
        mask[row, : pads if padding == "left" else 0] = 0
        mask[row, length - pads if padding == "right" else length :] = 0
    return ids.masked_fill(mask == 0, 0), mask


def own_and_dhsa(model, own, run):
    model.set_attn_implementation(own)
    expected = run()
    model.set_attn_implementation("dhsa")
    return expected, run()


# The two sides add the same float32 numbers in another order, through at most 4 layers.
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["paper", "accurate"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_prefill_equals_the_models_own_attention(name, padding, preset):
    model, own = build(name, DHSAConfig(preset, budget=128, **SETTINGS))
    ids, mask = prompts(padding)
    expected, got = own_and_dhsa(model, own, lambda: model(ids, attention_mask=mask).logits)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("decode", ["dense", "sparse"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_generate_equals_the_models_own_attention(name, padding, decode):
    model, own = build(name, DHSAConfig("accurate", budget=128, decode=decode, **SETTINGS))
    ids, mask = prompts(padding)

    def run():
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(made.logits), made.sequences

    (expected, expected_ids), (got, got_ids) = own_and_dhsa(model, own, run)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert torch.equal(got_ids, expected_ids)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
def test_a_prompt_in_pieces_equals_the_models_own_attention(name, padding):
    model, own = build(name, DHSAConfig("accurate", budget=128, **SETTINGS))
    ids, mask = prompts(padding)

    def run():
        cache, logits = DynamicCache(config=model.config), []
        for begin, end in ((0, 21), (21, 33), (33, 40)):
            step = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(step.logits)
        return torch.cat(logits, dim=1)

    expected, got = own_and_dhsa(model, own, run)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("decode", ["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_with_a_prefill_in_pieces_equals_the_models_own_attention(name, decode):
    model, own = build(name, DHSAConfig("accurate", budget=128, segment=16, decode=decode, **SETTINGS))
    ids, mask = prompts("left")

    def run():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, prefill_chunk_size=16, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip

    expected, got = own_and_dhsa(model, own, run)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **CLOSE)
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("decode", ["dense", "sparse"])
def test_a_quantized_cache_answers_as_under_the_models_own_attention(decode):
    """Its old keys come back rounded: chunks are those of the keys that it gives."""
    model, own = build("llama", DHSAConfig("accurate", budget=128, decode=decode, **SETTINGS))
    ids, mask = prompts("none")

    def run():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, cache_implementation="quantized",
            cache_config={"backend": "fp8"}, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip

    expected, got = own_and_dhsa(model, own, run)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **CLOSE)
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("band_kernel", [True, False])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_windows_many_times_shorter_than_the_prompt_equal_eager_attention(name, padding, band_kernel, monkeypatch):
    """Whole, in pieces that end off the query blocks, and token by token: 300 tokens, windows of 12, blocks of 128."""
    model, _ = build(name, DHSAConfig("accurate", budget=512, band_kernel=band_kernel, **SETTINGS))
    ids, mask = prompts(padding, length=300)
    bands = []
    attend = hf.ops.sparse_attention
    monkeypatch.setattr(
        hf.ops, "sparse_attention", lambda *a, **k: bands.append(k["window"]) or attend(*a, **k)
    )  # fmt: skip

    def run():
        whole = model(ids, attention_mask=mask).logits
        cache, logits = DynamicCache(config=model.config), []
        for begin, end in ((0, 7), (7, 150), (150, 297), (297, 298), (298, 299), (299, 300)):
            step = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(step.logits)
        return whole[mask.bool()], torch.cat(logits, dim=1)[mask.bool()]

    expected, got = own_and_dhsa(model, "eager", run)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (12 in bands) == (band_kernel or name == "gemma2")


def test_no_cache_and_no_mask():
    model, own = build("qwen3", DHSAConfig(budget=128, **SETTINGS))
    ids, _ = prompts("none")
    expected, got = own_and_dhsa(model, own, lambda: model(ids, use_cache=False).logits)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_bfloat16_model():
    model, own = build("gemma3", DHSAConfig(budget=128, **SETTINGS))
    model = model.to(torch.bfloat16)
    ids, mask = prompts("left")
    expected, got = own_and_dhsa(model, own, lambda: model(ids, attention_mask=mask).logits)
    torch.testing.assert_close(got[mask.bool()].float(), expected[mask.bool()].float(), rtol=0.05, atol=0.05)


# ---- small budgets


def tight(**changes) -> DHSAConfig:
    """Half of 150 keys; without refinement, so that the chunks alone decide."""
    return DHSAConfig("accurate", budget=76, refine=0, **{**SETTINGS, **changes})


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("decode", ["dense", "sparse"])
def test_pieces_of_whole_segments_choose_as_one_prefill(decode, share):
    """At half the budget: the same chunks, so the same keys, so the same logits and the same next token."""
    model, _ = build("llama", tight(segment=48, decode=decode, share_boundaries=share))
    model.set_attn_implementation("dhsa")
    ids, _ = prompts("none", length=150)
    whole = model(ids, use_cache=True)
    cache, logits = DynamicCache(config=model.config), []
    for begin in range(0, 150, 48):
        logits.append(model(ids[:, begin : begin + 48], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, **CLOSE)
    token = whole.logits[:, -1:].argmax(-1)
    after_pieces = model(token, past_key_values=cache).logits
    torch.testing.assert_close(after_pieces, model(token, past_key_values=whole.past_key_values).logits, **CLOSE)


def greedy(model, ids, steps, attention_mask=None):
    """Logits of `steps` greedy tokens, through one cache."""
    cache, out = DynamicCache(config=model.config), []
    step = model(ids, past_key_values=cache, attention_mask=attention_mask)
    for _ in range(steps):
        token = step.logits[:, -1:].argmax(-1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
        step = model(token, past_key_values=cache, attention_mask=attention_mask)
        out.append(step.logits[:, -1])
    return torch.stack(out)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("preset", ["paper", "accurate"])
def test_padding_does_not_change_what_a_row_keeps(padding, preset):
    model, _ = build("llama", DHSAConfig(preset, budget=76, decode="sparse", **SETTINGS))
    model.set_attn_implementation("dhsa")
    ids, mask = prompts(padding, length=150)
    if padding == "left":
        together = greedy(model, ids, 3, mask)
        alone = [greedy(model, ids[row : row + 1, mask[row] == 1], 3) for row in range(3)]
        torch.testing.assert_close(together, torch.cat(alone, dim=1), **CLOSE)
    else:
        together = model(ids, attention_mask=mask).logits
        for row in range(3):
            alone = model(ids[row : row + 1, mask[row] == 1]).logits[0]
            torch.testing.assert_close(together[row, mask[row] == 1], alone, **CLOSE)


def test_a_small_budget_is_sparse():
    model, own = build("llama", tight())
    ids, _ = prompts("none", length=150)
    expected, got = own_and_dhsa(model, own, lambda: model(ids).logits)
    torch.testing.assert_close(got[:, :64], expected[:, :64], **CLOSE)  # these blocks see fewer keys than the budget
    assert (got[:, 80:] - expected[:, 80:]).abs().max() > 1e-3


def test_layers_limits_dhsa_to_some_layers():
    ids, _ = prompts("none", length=150)
    model, own = build("llama", tight(layers=()))
    expected, got = own_and_dhsa(model, own, lambda: model(ids).logits)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("decode", ["dense", "sparse"])
def test_shared_boundaries_come_from_the_first_global_layer(decode, monkeypatch):
    calls = []
    select = hf.ops.select_boundaries
    monkeypatch.setattr(hf.ops, "select_boundaries", lambda *a, **k: calls.append(1) or select(*a, **k))
    model, _ = build("llama", tight(share_boundaries=True, decode=decode))
    model.set_attn_implementation("dhsa")
    ids, _ = prompts("none", length=150)
    first = model(ids).logits
    assert len(calls) == 1
    assert torch.equal(model(ids).logits, first) and len(calls) == 2
    greedy(model, ids, 2)
    own_boundaries, _ = build("llama", tight(decode=decode))
    own_boundaries.set_attn_implementation("dhsa")
    assert not torch.equal(own_boundaries(ids).logits, first)


def test_sparse_decode_reads_only_the_keys_it_keeps():
    model, own = build("llama", tight(layers=(1,)))
    ids, _ = prompts("none", batch=1, length=300)

    def poisoned_spans():  # a NaN value poisons every row that gives its key any weight, zero included
        count = 0
        for begin in range(16, 224, 16):
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache)
            cache.layers[1].values[:, :, begin : begin + 16] = float("nan")
            count += int(model(ids[:, -1:], past_key_values=cache).logits.isnan().any())
        return count

    dense, sparse = own_and_dhsa(model, own, poisoned_spans)
    assert dense == 13 and sparse < 13


# ---- one cache or another


def test_two_conversations_of_one_length_do_not_mix():
    model, _ = build("llama", tight())
    model.set_attn_implementation("dhsa")
    ids, _ = prompts("none", batch=2, length=150)
    alone = [greedy(model, ids[row : row + 1], 4) for row in range(2)]
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    steps = [model(ids[row : row + 1], past_key_values=caches[row]) for row in range(2)]
    together: list[list[torch.Tensor]] = [[], []]
    for _ in range(4):
        for row in range(2):
            steps[row] = model(steps[row].logits[:, -1:].argmax(-1), past_key_values=caches[row])
            together[row].append(steps[row].logits[:, -1])
    # Each step finds the other conversation's index and builds its own. Chunks of generated tokens may be cut elsewhere
    # by then, so only the first step is the same.
    for row in range(2):
        torch.testing.assert_close(together[row][0], alone[row][0], **CLOSE)


def test_reordered_rows_get_their_own_chunks():
    model, _ = build("llama", tight())
    model.set_attn_implementation("dhsa")
    ids, _ = prompts("none", batch=2, length=150)
    ids[:, -1] = 5  # the first layer's last keys are equal: only older keys tell the rows apart
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    got = model(torch.tensor([[7], [9]]), past_key_values=cache).logits
    fresh = DynamicCache(config=model.config)
    model(ids.flip(0), past_key_values=fresh)
    torch.testing.assert_close(got, model(torch.tensor([[7], [9]]), past_key_values=fresh).logits, **CLOSE)


def test_a_cropped_cache_is_indexed_anew():
    config = tight()
    model, _ = build("llama", config)
    model.set_attn_implementation("dhsa")
    ids, _ = prompts("none", batch=1, length=150)

    def cropped():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        cache.crop(-30)
        return cache

    got = model(ids[:, 120:121], past_key_values=cropped()).logits
    cache = cropped()
    hf.configure(model, config)  # forgets every index
    assert torch.equal(got, model(ids[:, 120:121], past_key_values=cache).logits)


def test_beam_search_equals_the_models_own_attention():
    model, own = build("llama", DHSAConfig("accurate", budget=128, **SETTINGS))
    ids, mask = prompts("none", batch=2)
    run = lambda: model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=3, do_sample=False)  # noqa: E731
    expected, got = own_and_dhsa(model, own, run)
    assert torch.equal(got, expected)


# ---- the fences


def test_below_min_length_is_dense_and_says_so_once(caplog):
    model, own = build("llama", DHSAConfig(budget=76, **{**SETTINGS, "min_length": 200}))
    ids, _ = prompts("none", length=150)
    with caplog.at_level(logging.WARNING, logger="dhsa_ext.hf"):
        expected, got = own_and_dhsa(model, own, lambda: model(ids).logits)
        model(ids)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert [r.message for r in caplog.records] == ["dhsa: attention is dense below 200 keys (min_length)"]


def refuses(match, error=NotImplementedError):
    return pytest.raises(error, match=match)


def test_custom_4d_masks_are_refused():
    model, _ = build("llama", tight())
    model.set_attn_implementation("dhsa")
    ids, _ = prompts("none")
    with refuses(r"attention_mask: expected a padding mask \[batch, tokens\] on global layers, got a custom mask"):
        model(ids, attention_mask=torch.ones(3, 1, 40, 40, dtype=torch.bool).tril())


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_packed_sequences_are_refused(name, use_cache):
    model, _ = build(name, tight())
    model.set_attn_implementation("dhsa")
    ids, _ = prompts("none")
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None].expand(3, -1)
    with refuses("packed sequences"):
        model(ids, position_ids=positions, use_cache=use_cache)


def test_static_caches_are_refused():
    model, _ = build("llama", tight())
    model.set_attn_implementation("dhsa")
    ids, _ = prompts("none")
    with refuses("static caches"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", do_sample=False)


@pytest.mark.parametrize("kind", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_image_tokens_are_refused(kind):
    """As vision-language models build them: a causal mask, or the pairs within one image."""
    model, _ = build("gemma3", tight())
    model.set_attn_implementation("dhsa")
    image = torch.tensor([False, True, True, False])
    with refuses("image tokens"):
        getattr(masking_utils, kind)(
            model.config, torch.zeros(1, 4, 32), None, None, or_mask_function=lambda b, h, q, kv: image[q] & image[kv]
        )


def test_bidirectional_models_are_refused():
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SMALL, num_hidden_layers=1, head_dim=16, use_bidirectional_attention=True)
    model = Gemma3ForCausalLM(config).eval()
    model.set_attn_implementation("dhsa")
    with refuses("masks"):
        model(prompts("none")[0])


def test_a_short_mask_is_refused():
    model, _ = build("llama", tight())
    model.set_attn_implementation("dhsa")
    ids, _ = prompts("none")
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with refuses("expected one entry for each of 41 past and new tokens, got 1"):
        model(ids[:, :1], attention_mask=torch.ones(3, 1), past_key_values=cache)


def test_gradients_are_refused():
    model, _ = build("llama", tight())
    model.set_attn_implementation("dhsa")
    with torch.enable_grad(), refuses("forward only: call the model under torch.no_grad", RuntimeError):
        model(prompts("none")[0])


@pytest.mark.parametrize(
    "argument, value, match",
    [
        ("dropout", 0.1, "dropout: expected 0"),
        ("is_causal", False, "is_causal"),
        ("output_attentions", True, "output_attentions"),
        ("s_aux", torch.zeros(4), "s_aux: expected an attention without it"),
        ("cu_seq_lens_q", torch.zeros(2), "cu_seq_lens_q: expected an attention without it"),
    ],
)
def test_unknown_arguments_are_refused(argument, value, match):
    model, _ = build("llama")
    q = torch.zeros(1, 4, 5, 16)
    with refuses(match):
        hf.dhsa_attention(model.model.layers[0].self_attn, q, q, q, None, **{argument: value})


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(hf, "sdpa_mask", lambda batch_size, cache_position: None)
    with refuses("expected 5.4 or newer, got 5", ImportError):
        hf.register()


def test_register_names_both_interfaces():
    hf.register(DHSAConfig(budget=512), name="dhsa_test")
    assert "dhsa_test" in AttentionInterface() and "dhsa_test" in AttentionMaskInterface()
    model, _ = build("llama")
    assert hf._state_of(model.model.layers[0].self_attn).model.config.budget == 512
    hf.register()


# ---- settings


def test_presets_are_the_specs():
    paper, accurate = DHSAConfig("paper"), DHSAConfig("accurate")
    assert (paper.q_block, paper.pool, paper.score, paper.refine) == (128, "sqrt", "dot", 0)
    assert (paper.sink, paper.local, paper.dense_tail, paper.decode) == (128, 128, 64, "dense")
    assert paper.heads(8, 2) == 1 and paper.max_chunks(4096) == 256
    assert (accurate.q_block, accurate.pool, accurate.score, accurate.refine) == ("auto", "mean", "mass", "auto")
    assert (accurate.sink, accurate.local, accurate.dense_tail) == (16, 64, 0)
    assert (accurate.q_stride, accurate.rows, paper.q_stride, paper.rows) == ("auto", "mean", 8, "sample")
    assert accurate.decode == "sparse" and accurate.heads(8, 2) == 2
    for config in (paper, accurate):
        assert (config.nms_radius, config.boundary_window) == (8, 4)
    assert str(DHSAConfig("paper", q_block=64)) == "DHSAConfig(preset='paper', budget=1024, q_block=64)"


@pytest.mark.parametrize(
    ("settings", "keys", "q_block", "q_stride", "refine", "decode_refine"),
    [
        ({}, 100, 64, 8, 8, 8),
        ({}, 16384, 64, 8, 8, 8),
        ({}, 16385, 128, 64, 8, 4),
        ({"q_block": 64}, 200_000, 64, 32, 4, 4),
        ({"q_block": 1}, 200_000, 1, 1, 4, 4),
        ({"budget": 512}, 8192, 64, 8, 16, 16),
        ({"budget": 512}, 16385, 64, 32, 8, 8),
        ({"budget": 690, "sink": 500}, 16385, 64, 32, 4, 4),  # no room for 128 queries' own keys
        ({"q_block": 32, "q_stride": 5, "refine": 3}, 16385, 32, 5, 3, 3),
        ({"refine": 0}, 16385, 128, 64, 0, 0),
    ],
)
def test_auto_follows_keys_and_budget(settings, keys, q_block, q_stride, refine, decode_refine):
    config = DHSAConfig("accurate", **settings)
    settled = config.over(keys)
    assert (settled.q_block, settled.q_stride, settled.refine) == (q_block, q_stride, refine)
    prefill = config.prefill_args(4, 2, keys)
    assert (prefill["q_block"], prefill["q_stride"], prefill["refine"]) == (q_block, q_stride, refine)
    assert prefill["rows"] == "mean" and config.decode_args(keys)["refine"] == decode_refine
    assert settled.over(keys) == settled == settled.over(1)


@pytest.mark.parametrize("preset, least", [("paper", 128 + 128 + 127), ("accurate", 16 + 64 + 63)])
def test_a_budget_must_hold_the_forced_keys(preset, least):
    assert DHSAConfig(preset, budget=least).budget == least
    with pytest.raises(ValueError, match=f"budget: expected at least {least} .*got {least - 1}"):
        DHSAConfig(preset, budget=least - 1)


def test_sparse_decode_must_hold_the_open_tail():
    with pytest.raises(ValueError, match="budget: expected at least 83"):
        DHSAConfig(budget=82, q_block=1)


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(preset="best"), "preset: expected one of 'paper', 'accurate', got 'best'"),
        (dict(select_heads="all"), "select_heads"),
        (dict(q_block=0), 'q_block: expected an integer of at least 1 or "auto", got 0'),
        (dict(sink=-1), "sink"),
        (dict(rows="max"), "rows: expected one of 'sample', 'mean', got 'max'"),
        (dict(refine="most"), "refine: expected an integer of at least 0 or \"auto\", got 'most'"),
        (dict(decode="fast"), "decode"),
        (dict(nms_radius=64), "nms_radius: expected less than 64"),
    ],
)
def test_settings_are_checked(settings, match):
    with pytest.raises(ValueError, match=match):
        DHSAConfig(**settings)
