"""A decoder Transformer, wide enough to hold Llama 2/3, Mistral, Qwen 2/2.5/3 and GPT-2 exactly.

Read the file from the bottom: `Decoder` takes tokens and gives logits or a loss; a `Block` is attention, then MLP.
Plain modules, no collectives.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema.model import DecoderSection
from models.cross_entropy import Head, LossSums
from models.masks import attention_mask, document_starts
from models.rope import rope_frequencies, rope_tables, rotate


class Context:
    """What every block of one forward reads: rotary tables (fp32) and the attention mask. Either may be None.

    A plain object on purpose. FSDP casts the floating-point arguments of a module to the compute dtype, and looks for
    them in tuples, dicts and dataclasses too. Tables in bf16 would blur positions.
    """

    def __init__(self, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> None:
        self.rope = rope
        self.mask = mask


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    return nn.LayerNorm(width, eps=eps) if kind == "layernorm" else nn.RMSNorm(width, eps=eps)


class Attention(nn.Module):
    """Causal attention with grouped queries, rotary positions, and norms on queries and keys where the section asks."""

    def __init__(self, section: DecoderSection) -> None:
        super().__init__()
        kv_heads = section.kv_heads or section.heads
        self.head_dim = section.head_dim or section.dim // section.heads
        self.group = section.heads // kv_heads  # query heads per key-value head
        self.dropout = section.dropout
        self.wq = nn.Linear(section.dim, section.heads * self.head_dim, bias=section.qkv_bias)
        self.wk = nn.Linear(section.dim, kv_heads * self.head_dim, bias=section.qkv_bias)
        self.wv = nn.Linear(section.dim, kv_heads * self.head_dim, bias=section.qkv_bias)
        if section.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=section.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=section.norm_eps)
        self.qk_norm = section.qk_norm
        self.wo = nn.Linear(section.heads * self.head_dim, section.dim, bias=section.out_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.wq(x).view(heads), self.wk(x).view(heads), self.wv(x).view(heads)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rope is not None:
            q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        if self.group > 1 and context.mask is not None:
            # On CUDA no fused kernel takes both a mask and grouped heads. Copies of k and v are far smaller than T x T.
            k, v = k.repeat_interleave(self.group, dim=2), v.repeat_interleave(self.group, dim=2)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=context.mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=context.mask is None,
            enable_gqa=k.shape[2] < q.shape[2],
        )
        return self.wo(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The feed-forward part of a block: gated (SwiGLU), or plain with GELU."""

    def __init__(self, section: DecoderSection) -> None:
        super().__init__()
        self.kind = section.mlp
        if self.kind == "swiglu":
            self.gate = nn.Linear(section.dim, section.mlp_dim, bias=section.mlp_bias)
        self.up = nn.Linear(section.dim, section.mlp_dim, bias=section.mlp_bias)
        self.down = nn.Linear(section.mlp_dim, section.dim, bias=section.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class Block(nn.Module):
    """One layer: attention, then MLP. Each has a norm before it, and is added to the residual stream."""

    def __init__(self, section: DecoderSection) -> None:
        super().__init__()
        self.attn_norm = make_norm(section.norm, section.dim, section.norm_eps)
        self.attn = Attention(section)
        self.mlp_norm = make_norm(section.norm, section.dim, section.norm_eps)
        self.mlp = MLP(section)
        self.drop = nn.Dropout(section.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.drop(self.attn(self.attn_norm(x), context))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """The model: embedding, blocks, norm, head. Modules stand in the order in which forward uses them."""

    def __init__(self, section: DecoderSection) -> None:
        super().__init__()
        self.section = section
        words = section.vocab_size or 1  # only names are asked for while the data have not decided it
        self.embed = nn.Embedding(words, section.dim)
        self.pos = nn.Embedding(section.max_seq_len, section.dim) if section.position == "learned" else None
        self.drop = nn.Dropout(section.dropout)
        self.blocks = nn.ModuleList(Block(section) for _ in range(section.layers))
        self.norm = make_norm(section.norm, section.dim, section.norm_eps)
        self.head = Head(section.dim, words)
        self._tie()

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        z_loss: float = 0.0,
        chunk_tokens: int = 1024,
    ) -> Tensor | LossSums:
        """Logits (B, T, V) of tokens (B, T), or with targets (B, T) the sums of their loss.

        documents (B, T) gives each token's document. Then tokens see only their own document, and positions start again
        with each document: a packed row gives what its documents give alone. Raises ValueError when there are more
        tokens than learned positions.
        """
        seq_len, device = tokens.shape[1], tokens.device
        starts = None if documents is None else document_starts(documents)
        positions = torch.arange(seq_len, device=device)[None]
        if starts is not None:
            positions = positions - starts
        x = self.embed(tokens)
        if self.pos is not None:
            if seq_len > self.section.max_seq_len:
                raise ValueError(f"{seq_len} tokens, but learned positions for {self.section.max_seq_len}")
            x = x + self.pos(positions)
        x = self.drop(x)
        mask = attention_mask(seq_len, starts, self.section.sliding_window, device)
        context = Context(self._rope(positions), mask)
        for block in self.blocks:
            x = block(x, context)
        return self.head(self.norm(x), targets, z_loss, chunk_tokens)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotary tables, computed in every forward: a buffer would have to survive meta device, casts and loading."""
        section = self.section
        if section.position != "rope":
            return None
        head_dim = section.head_dim or section.dim // section.heads
        frequencies = rope_frequencies(head_dim, section.rope_theta, section.rope_scaling, positions.device)
        return rope_tables(positions, frequencies)

    def shard_units(self) -> list[list[nn.Module]]:
        """Modules to be sharded together, in forward order. The root shards the remaining parameters.

        A tied weight is used at both ends of the forward, so the root holds it and its neighbours.
        """
        blocks: list[list[nn.Module]] = [[block] for block in self.blocks]
        if self.section.tie_embeddings:
            return blocks
        first: list[nn.Module] = [self.embed] if self.pos is None else [self.embed, self.pos]
        return [first, *blocks, [self.norm, self.head]]

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the whole, unsharded parameter of that name in place, with numbers from the generator alone.

        Norms are 1, biases 0, the rest normal with init_std. Weights that write to the residual stream are smaller by
        sqrt(2 * layers) (as in GPT-2). So the stream's variance does not grow with depth.
        """
        *_, module, kind = name.split(".")
        if kind == "bias":
            tensor.zero_()
        elif module.endswith("norm"):
            tensor.fill_(1.0)
        else:
            residual = module in ("wo", "down")
            std = self.section.init_std / (math.sqrt(2 * self.section.layers) if residual else 1.0)
            tensor.normal_(0.0, std, generator=generator)

    def _tie(self) -> None:
        if self.section.tie_embeddings:
            self.head.weight = cast(nn.Parameter, self.embed.weight)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Tie the weights again: `to_empty` and `to` may give each module a parameter of its own."""
        super()._apply(fn, recurse)
        self._tie()
        return self
