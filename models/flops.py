"""Parameters and floating-point operations per token, counted from the model itself.

The convention is torchtitan's: 6 N + 12 L H Q T per token. N is the number of parameters without the input embeddings
(a tied head is a product and counts). L is the number of layers, H of query heads, Q their width, T the sequence
length. The sum splits into

    forward              2 per weight,  4 H Q T per layer     always
    activation gradient  2 per weight,  8 H Q T per layer     where the input of the product needs a gradient
    weight gradient      2 per weight                         where the weight is trainable

so that with frozen parts only the products that autograd does are counted. Backward ends at the lowest trainable
parameter. Attention's backward counts whole once a query, key or value needs a gradient: fused kernels have no half.

Attention counts all T x T pairs; `causal_flops_per_token` counts the pairs that a token sees. Recomputation for
activation checkpointing counts in neither, since it is not the model's work.
"""

from torch import nn

from models.decoder import Block, Decoder


def parameter_count(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters. A tied one counts once, a sharded one counts whole."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def flops_per_token(model: Decoder, seq_len: int) -> float:
    """FLOPs of forward and backward per token in a sequence of seq_len, for what trains now; no causal discount."""
    return _flops(model, seq_len)


def causal_flops_per_token(model: Decoder, seq_len: int) -> float:
    """The same, but attention counts only the pairs that causality and the sliding window allow (not documents)."""
    window = min(model.section.sliding_window or seq_len, seq_len)
    pairs = window * (window + 1) / 2 + (seq_len - window) * window
    return _flops(model, pairs / seq_len)


def _flops(model: Decoder, keys: float) -> float:
    """FLOPs per token, walked as autograd does. `keys`: how many keys a query meets, on average.

    `needs`: whether the residual stream needs a gradient. It is false below the lowest trainable parameter, true above.
    """
    scores = _scores(model, keys)
    inputs: list[nn.Module] = [model.embed] if model.pos is None else [model.embed, model.pos]
    needs = any(map(_trainable, inputs))
    total = 0.0
    for block in model.blocks:
        assert isinstance(block, Block)
        attn, mlp = block.attn, block.mlp
        before: list[list[nn.Module]] = [[block.attn_norm], [attn.wq, attn.wk, attn.wv]]
        if attn.qk_norm:
            before.append([attn.q_norm, attn.k_norm])
        projections, scores_need = stages(before, needs)
        output, attn_needs = stages([[attn.wo]], scores_need)
        total += projections + scores * (3 if scores_need else 1) + output
        needs = needs or attn_needs
        inner: list[nn.Module] = [mlp.gate, mlp.up] if mlp.kind == "swiglu" else [mlp.up]
        products, mlp_needs = stages([[block.mlp_norm], inner, [mlp.down]], needs)
        total += products
        needs = needs or mlp_needs
    return total + stages([[model.norm], [model.head]], needs)[0]


def stages(stages: list[list[nn.Module]], needs: bool) -> tuple[float, bool]:
    """(FLOPs of the stages, whether the last output needs a gradient). Each stage holds modules that read one input.
    `needs`: whether the first input needs a gradient."""
    total = 0.0
    for stage in stages:
        total += sum(
            (4 if needs else 2) * parameter_count(module) + 2 * parameter_count(module, trainable_only=True)
            for module in stage
        )
        needs = needs or any(map(_trainable, stage))
    return total, needs


def _scores(model: Decoder, keys: float) -> float:
    """FLOPs of one layer's attention products (queries by keys, weights by values) in forward: 4 H Q per key."""
    section = model.section
    return 4.0 * section.heads * (section.head_dim or section.dim // section.heads) * keys


def _trainable(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
