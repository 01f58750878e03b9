"""The `model` section of the config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from configs.schema.own import OwnModel
from configs.schema.section import MILLION, MOST_TOKENS, MOST_WORDS, OWN, Section, by_name, from_data, result


class RopeScaling(Section):
    """Llama 3's scaling of rotary frequencies for long contexts."""

    factor: float = result(8.0, "how far low frequencies are slowed", gt=0, le=MILLION)
    low_freq_factor: float = result(1.0, "wavelengths above original / this are slowed fully", gt=0, le=MILLION)
    high_freq_factor: float = result(4.0, "wavelengths below original / this are kept", gt=0, le=MILLION)
    original_seq_len: int = result(8192, "context length the frequencies were made for", ge=1, le=MOST_TOKENS)


class DecoderSection(Section):
    """A decoder Transformer, wide enough for Llama 2/3, Mistral, Qwen 2/2.5/3 and GPT-2."""

    name: Literal["decoder"] = result("decoder", "a decoder Transformer")
    vocab_size: int | None = from_data("rows of the embedding; at least the tokenizer's size", ge=2, le=MOST_WORDS)
    dim: int = result(..., "width of the residual stream", ge=1, le=MILLION)
    layers: int = result(..., "number of blocks", ge=1, le=MILLION)
    heads: int = result(..., "query heads", ge=1, le=MILLION)
    kv_heads: int | None = result(
        None, "key and value heads (grouped-query attention); default: as `heads`", ge=1, le=MILLION
    )
    head_dim: int | None = result(None, "width of a head; default: dim / heads", ge=2, le=MILLION)
    mlp_dim: int = result(..., "width inside the MLP", ge=1, le=2**31 - 1)
    mlp: Literal["swiglu", "gelu", "gelu_tanh"] = result("swiglu", "gated SwiGLU, or a plain MLP with GELU")
    norm: Literal["rmsnorm", "layernorm"] = result("rmsnorm", "kind of normalisation (layernorm has a bias)")
    norm_eps: float = result(1e-5, "added to the variance", gt=0, le=1)
    position: Literal["rope", "learned"] = result("rope", "rotary or learned positions")
    rope_theta: float = result(10000.0, "base of the rotary frequencies", gt=0, le=1e15)
    rope_scaling: RopeScaling | None = result(None, "Llama 3's frequency scaling")
    max_seq_len: int = result(..., "longest sequence; rows of the learned positions", ge=1, le=MOST_TOKENS)
    qkv_bias: bool = result(False, "biases on the query, key and value projections")
    out_bias: bool = result(False, "bias on the attention output projection")
    mlp_bias: bool = result(False, "biases in the MLP")
    qk_norm: bool = result(False, "RMSNorm on each head's queries and keys (Qwen 3)")
    tie_embeddings: bool = result(False, "the head uses the embedding's weight")
    sliding_window: int | None = result(
        None, "a token sees this many latest tokens, itself included", ge=1, le=MOST_TOKENS
    )
    dropout: float = result(0.0, "dropout on embeddings, attention weights and residual branches", ge=0, lt=1)
    init_std: float = result(0.02, "standard deviation of initial weights", gt=0, le=1000)

    @model_validator(mode="after")
    def _fits(self) -> DecoderSection:
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}; give head_dim")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.position == "rope" and (self.head_dim or self.dim // self.heads) % 2:
            raise ValueError("rotary positions need an even head_dim")
        if self.position == "learned" and self.rope_scaling is not None:
            raise ValueError("rope_scaling has no meaning with learned positions")
        return self


class MlpSection(Section):
    """A multilayer perceptron: from numbers to one score per class, or to one number per target."""

    name: Literal["mlp"] = result(..., "a multilayer perceptron")
    features: int | None = from_data("numbers that go in", ge=1, le=MILLION)
    hidden: list[Annotated[int, Field(ge=1, le=MILLION)]] = result(
        [64], "width of each hidden layer, in order; []: a linear model", max_length=1000
    )
    outputs: int | None = from_data("classes, or 1 target: numbers that come out", ge=1, le=MILLION)
    activation: Literal["relu", "gelu", "tanh"] = result("relu", "after each hidden layer")
    norm: Literal["none", "layernorm"] = result("none", "before each activation")
    norm_eps: float = result(1e-5, "added to the variance", gt=0, le=1)
    dropout: float = result(0.0, "dropout after each activation", ge=0, lt=1)


ModelSection = Annotated[
    Annotated[DecoderSection, Tag("decoder")] | Annotated[MlpSection, Tag("mlp")] | Annotated[OwnModel, Tag(OWN)],
    by_name("decoder"),
]
"""One of these sections, chosen by its `name`; the decoder where no name is given."""
