"""DecodeStep: equal to the model's own decode at a budget that holds every key; captured, compiled and eager alike."""

from __future__ import annotations

import pytest
import torch
from test_hf import ALTERNATING, CLOSE, MODELS, SETTINGS, SMALL, build, greedy, prompts, tight
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

from dhsa_ext import hf
from dhsa_ext.config import DHSAConfig
from dhsa_ext.decode_step import DecodeStep


@pytest.fixture(autouse=True)
def registered():
    hf.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def stepwise(model, ids, steps, mode="eager", config=None, implementation="dhsa", feed=None):
    """Logits [steps, B, V] of greedy tokens, or of those in `feed`, and the DecodeStep."""
    model.set_attn_implementation(implementation)
    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache).logits
    step = DecodeStep(model, cache, config, max_new_tokens=steps, mode=mode)
    out = []
    for n in range(steps):
        token = logits[:, -1:].argmax(-1) if feed is None else feed[:, n : n + 1]
        logits = step(token)
        out.append(logits[:, -1].clone())
    return torch.stack(out), step


@pytest.mark.parametrize("decode", ["dense", "sparse"])
@pytest.mark.parametrize("preset", ["paper", "accurate"])
@pytest.mark.parametrize("name", MODELS)
def test_a_budget_that_holds_every_key_equals_the_models_own_decode(name, preset, decode):
    """40 tokens and 30 more, past windows of 12, with chunks closing on the way."""
    model, own = build(name, DHSAConfig(preset, budget=160, decode=decode, **SETTINGS))
    ids, _ = prompts("none")
    model.set_attn_implementation(own)
    expected = greedy(model, ids, 30)
    got, step = stepwise(model, ids, 30)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert bool(step.sparse) == (decode == "sparse")


def test_window_longer_than_the_text():
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, num_hidden_layers=2, head_dim=16, sliding_window=60, layer_types=ALTERNATING)
    model = Gemma2ForCausalLM(config).eval()
    hf.configure(model, DHSAConfig("accurate", budget=160, **SETTINGS))
    ids, _ = prompts("none")
    model.set_attn_implementation("eager")
    expected = greedy(model, ids, 30)  # the window fills, and moves on
    torch.testing.assert_close(stepwise(model, ids, 30)[0], expected, **CLOSE)


@pytest.mark.parametrize("name, decode", [("gemma2", "sparse"), ("llama", "dense")])
def test_compiled_equals_eager(name, decode):
    model, _ = build(name, tight(decode=decode))
    ids, _ = prompts("none", length=150)
    expected, _ = stepwise(model, ids, 6)
    torch._dynamo.reset()
    got, _ = stepwise(model, ids, 6, mode="compile")
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("decode", ["dense", "sparse"])
@pytest.mark.parametrize("preset", ["paper", "accurate"])
def test_cuda_graph_equals_eager(preset, decode):
    from model_shapes import build as build_shape

    hf.register(DHSAConfig(preset, budget=512, decode=decode))
    for name in ("tiny", "tiny-gemma-2"):
        model = build_shape(name, "cuda", torch.bfloat16)
        ids = torch.randint(2, 128, (2, 700), device="cuda")
        feed = torch.randint(2, 128, (2, 80), device="cuda")
        expected, _ = stepwise(model, ids, 80, feed=feed)
        got, _ = stepwise(model, ids, 80, mode="graph", feed=feed)
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("config", [tight(), tight(score="dot", pool="sqrt"), tight(share_boundaries=True)])
def test_chunks_are_those_of_a_chunk_index(config):
    """80 tokens later, each layer's chunks are those of its ChunkIndex, given the same keys; bit for bit."""
    model, _ = build("llama", config)
    ids, _ = prompts("none", batch=2, length=150)
    model.set_attn_implementation("dhsa")
    feed = torch.randint(2, 97, (2, 80))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    indices = [hf._state_of(layer.self_attn).indices[0] for layer in model.model.layers]
    step = DecodeStep(model, cache, max_new_tokens=80, mode="eager")
    before = step.num_chunks.clone()
    for n in range(80):
        step(feed[:, n : n + 1])
    assert bool((step.num_chunks > before).all())
    for i, index in enumerate(indices):
        index.extend(step.buffers[i][0][:, :, 150:230])
        assert torch.equal(step.num_chunks[i], index.num_chunks) and torch.equal(step.starts[i], index.tail_starts)
        for row, count in enumerate(index.num_chunks.tolist()):
            assert torch.equal(step.offsets[i, row, : count + 1], index.offsets[row, : count + 1])
            assert torch.equal(step.pooled[i, row, :, :count], index.pooled[row, :, :count])


@pytest.mark.parametrize("refine", [0, 4])
@pytest.mark.parametrize("score", ["dot", "mass"])
def test_a_new_token_attends_as_over_a_cache_of_its_length(score, refine, monkeypatch):
    """Buffers with room, whose length only the device knows, against views of them that end with the new token."""
    model, _ = build("llama", DHSAConfig("accurate", budget=128, score=score, refine=refine, **SETTINGS))
    ids, _ = prompts("none", batch=2, length=150)
    decode, lengths = hf.ops.sparse_decode, []

    def spy(q, k, v, *chunks, cache_seqlens, **options):
        (length,) = set(cache_seqlens.tolist())
        lengths.append(length)
        out = decode(q, k, v, *chunks, cache_seqlens=cache_seqlens, **options)
        torch.testing.assert_close(out, decode(q, k[:, :, :length], v[:, :, :length], *chunks, **options))
        return out

    model.set_attn_implementation("dhsa")
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    step = DecodeStep(model, cache, max_new_tokens=80, mode="eager")
    monkeypatch.setattr(hf.ops, "sparse_decode", spy)
    for n in range(80):
        step(torch.full((2, 1), 5 + n % 7))
    assert lengths == [151 + n for n in range(80) for _ in step.sparse]


def test_it_ends_where_its_buffers_end():
    model, _ = build("llama", tight())
    ids, _ = prompts("none", length=150)
    _, step = stepwise(model, ids, 2)
    with pytest.raises(RuntimeError, match="token: expected at most the max_new_tokens asked for"):
        step(ids[:, :1])


def test_what_is_refused():
    model, _ = build("llama", tight())
    with pytest.raises(ValueError, match="cache: expected a DynamicCache that holds a prompt, got DynamicCache of 0"):
        DecodeStep(model, DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    model(prompts("none", length=150)[0], past_key_values=cache)
    with pytest.raises(ValueError, match="mode: expected one of eager, compile, graph, got 'fast'"):
        DecodeStep(model, cache, mode="fast")
    short = DynamicCache(config=model.config)
    model(prompts("none", length=5)[0], past_key_values=short)
    with pytest.raises(ValueError, match="cache: expected 8 tokens or more, got 5"):
        DecodeStep(model, short, tight(min_length=0))
