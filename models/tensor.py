"""How each model is split over ranks that compute every sample together. Plain data, which an engine applies.

Between matrices each rank holds its share of the tokens ("sequence parallel"). Attention and MLP see all tokens, but
only this rank's share of heads and channels. They give partial sums, which are summed and cut into tokens again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.cross_entropy import IGNORE


@dataclass(frozen=True)
class TensorPlan:
    """Globs over module names. A model need not have every module. Each parameter is in exactly one of the first
    five."""

    columns: tuple[str, ...]  # linear layers that give this rank's share of channels: weight and bias cut by rows
    rows: tuple[str, ...]  # linear layers from such a share to partial sums: weight cut by columns, bias whole
    whole: tuple[str, ...]  # norms, whole on each rank, over this rank's tokens or heads: gradients are partial sums
    positions: tuple[str, ...]  # embeddings of positions: whole on each rank, looked up for this rank's tokens alone
    vocabulary: tuple[str, ...]  # the embedding of tokens and the head: each rank holds some of the words
    gathered: tuple[str, ...]  # modules whose first argument must hold all tokens
    # Arguments of the model that hold sequences (B, T), and the value that fills T up to a multiple of the ranks.
    filled: Mapping[str, int] = field(default_factory=dict)


PLANS: Mapping[str, TensorPlan] = {
    "decoder": TensorPlan(
        columns=("blocks.*.attn.wq", "blocks.*.attn.wk", "blocks.*.attn.wv", "blocks.*.mlp.gate", "blocks.*.mlp.up"),
        rows=("blocks.*.attn.wo", "blocks.*.mlp.down"),
        whole=("blocks.*.*_norm", "norm"),  # * crosses dots: the norms of queries and keys are among them
        positions=("pos",),
        vocabulary=("embed", "head"),
        gathered=("blocks.*.attn", "blocks.*.mlp", "head"),
        filled={"tokens": 0, "documents": 0, "targets": IGNORE},
    ),
}
