"""The FLOPs that we claim are those of torch's products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.schema.model import DecoderSection
from models import Decoder, build_model
from models.flops import causal_flops_per_token, flops_per_token, parameter_count

LLAMA: dict[str, Any] = {"vocab_size": 128256, "kv_heads": 8, "max_seq_len": 8192}
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "llama3-1b": ({"dim": 2048, "layers": 16, "heads": 32, "mlp_dim": 8192, "tie_embeddings": True}, 1_235_814_400),
    "llama3-8b": ({"dim": 4096, "layers": 32, "heads": 32, "mlp_dim": 14336}, 8_030_261_248),
    "llama3-70b": ({"dim": 8192, "layers": 80, "heads": 64, "mlp_dim": 28672}, 70_553_706_496),
    "llama3-405b": ({"dim": 16384, "layers": 126, "heads": 128, "mlp_dim": 53248}, 405_853_388_800),
}
LARGE = {"dim": 256, "layers": 3, "heads": 8, "kv_heads": 2, "mlp_dim": 384, "vocab_size": 500}


def on_meta(section: DecoderSection) -> Decoder:
    with torch.device("meta"):
        model = build_model(section).module
    assert isinstance(model, Decoder)
    return model


def shape(name: str) -> Decoder:
    return on_meta(DecoderSection(**LLAMA, **SHAPES[name][0]))


def small_weights(model: Decoder) -> int:
    """How many weights outside embeddings are in no matrix product: norms and biases."""
    return sum(p.numel() for p in model.parameters() if p.dim() == 1)


def counted(model: Decoder, seq_len: int, backward: bool) -> float:
    """Operations per token of torch's own products. On meta, attention runs as two plain products of T x T."""
    tokens = torch.zeros(2, seq_len, dtype=torch.int64, device="meta")

    def added_product(_: Any, left: Any, right: Any, **__: Any) -> int:
        return int(2 * left[0] * left[1] * right[1])

    in_place = {torch.ops.aten.addmm_: added_product}  # torch itself counts this as nothing
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        if backward:
            model(tokens, targets=tokens, chunk_tokens=64).total.backward()
        else:
            model(tokens)
    return counter.get_total_flops() / tokens.numel()


@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_have_their_parameters(name: str) -> None:
    assert parameter_count(shape(name)) == SHAPES[name][1]


def test_the_8b_shape_costs_what_others_count() -> None:
    """KempnerForge counts all parameters: 54.6 GFLOP at 4096 tokens. torchtitan, like us, leaves out the embedding."""
    model, attention = shape("llama3-8b"), 12 * 32 * 32 * 128 * 4096
    assert 6 * parameter_count(model) + attention == pytest.approx(54.6e9, rel=1e-3)
    assert flops_per_token(model, 4096) == 6 * (parameter_count(model) - model.embed.weight.numel()) + attention
    half = attention * 4097 / 8192
    assert causal_flops_per_token(model, 4096) == pytest.approx(
        flops_per_token(model, 4096) - attention + half, rel=1e-12
    )


def test_a_tied_head_counts_once() -> None:
    model = shape("llama3-1b")
    assert flops_per_token(model, 2048) == 6 * 1_235_814_400 + 12 * 16 * 32 * 64 * 2048


def test_forward_of_the_8b_shape_is_what_torch_counts() -> None:
    """Up to the 266,240 weights of norms, which count in N by convention but are in no matrix product."""
    model = shape("llama3-8b").requires_grad_(False)
    assert flops_per_token(model, 256) - 2 * small_weights(model) == counted(model, 256, backward=False)


def test_the_sliding_window_counts_what_it_leaves(section: Callable[..., DecoderSection]) -> None:
    model = on_meta(section(sliding_window=5))
    pairs = sum(min(query + 1, 5) for query in range(20))
    full = flops_per_token(model, 20)
    attention = 12 * 2 * 4 * 8
    assert causal_flops_per_token(model, 20) == pytest.approx(full - attention * 20 + attention * pairs / 20)


KINDS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "tied": {"tie_embeddings": True},
    "wide heads, norms": {"head_dim": 48, "qk_norm": True},
    "gpt2": {
        "norm": "layernorm", "position": "learned", "mlp": "gelu_tanh", "tie_embeddings": True, "kv_heads": None,
        "qkv_bias": True, "out_bias": True, "mlp_bias": True,
    },
}  # fmt: skip
FREEZES: dict[str, tuple[str, ...]] = {
    "all": ("",),
    "no embedding": ("blocks", "norm", "head"),
    "head and norm": ("head", "norm."),
    "last block": ("blocks.2",),
    "middle block": ("blocks.1",),
    "attention of the first block": ("blocks.0.attn.",),
    "outputs of the middle block": ("blocks.1.attn.wo",),
    "inside the middle MLP": ("blocks.1.mlp.up",),
    "last projection of the first block": ("blocks.0.mlp.down",),
    "norms": ("norm.", "blocks.0.attn_norm", "blocks.1.mlp_norm"),
    "embedding": ("embed",),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freeze", FREEZES)
def test_forward_and_backward_are_what_torch_counts(
    kind: str, freeze: str, section: Callable[..., DecoderSection]
) -> None:
    """With any part frozen. Exact except for norms and biases, 0.3 % of N here, which are in no matrix product."""
    model = on_meta(section(**{**LARGE, **KINDS[kind]}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(FREEZES[freeze]))
    claimed, seen = flops_per_token(model, 48), counted(model, 48, backward=True)
    assert seen <= claimed <= seen + 6 * small_weights(model)


def test_queries_alone_still_cost_all_of_attentions_backward(section: Callable[..., DecoderSection]) -> None:
    """Fused kernels give all gradients of queries, keys and values or none. The plain products on meta leave out
    half."""
    model = on_meta(section(**LARGE))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "blocks.2.attn.wq.weight")
    difference = flops_per_token(model, 48) - counted(model, 48, backward=True) - 4 * 8 * 32 * 48
    assert 0 <= difference <= 6 * small_weights(model)


def test_nothing_trainable_costs_the_forward(section: Callable[..., DecoderSection]) -> None:
    model = on_meta(section(**LARGE)).requires_grad_(False)
    weights = sum(map(parameter_count, (*model.blocks, model.norm, model.head)))
    assert flops_per_token(model, 48) == 2 * weights + 4 * len(model.blocks) * 8 * 32 * 48


def test_a_batch_costs_what_its_tokens_do() -> None:
    with torch.device("meta"):
        built = build_model(DecoderSection(**LARGE, max_seq_len=64))
    assert isinstance(built.module, Decoder)
    tensors = {"tokens": torch.zeros(3, 48, dtype=torch.int64, device="meta")}
    assert built.flops(tensors) == 3 * 48 * flops_per_token(built.module, 48)
    trained = built.flops(tensors)
    built.module.blocks.requires_grad_(False)  # counts what trains now, not what trained when the model was built
    assert built.flops(tensors) == 3 * 48 * flops_per_token(built.module, 48) < trained
