"""The decoder as engines use it: meta device, names, initialisation, sharding, checkpointing, compile."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from configs.schema.model import DecoderSection
from models import Decoder, LossSums, build_model
from models.decoder import Attention

GPT2: dict[str, Any] = {
    "norm": "layernorm", "position": "learned", "mlp": "gelu_tanh", "tie_embeddings": True, "kv_heads": None,
    "qkv_bias": True, "out_bias": True, "mlp_bias": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied, norms, window": {"tie_embeddings": True, "qk_norm": True, "sliding_window": 6},
    "learned, untied": {"position": "learned", "mlp": "gelu"},
    "gpt2": GPT2,
}


def batch(seq_len: int = 24) -> dict[str, Tensor]:
    tokens, targets = torch.randint(0, 97, (2, 2, seq_len), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(seq_len) // 9).expand(2, -1)
    return {"tokens": tokens, "documents": documents, "targets": targets}


def loss_and_gradients(model: Decoder, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    sums = model(**inputs, chunk_tokens=16)
    assert isinstance(sums, LossSums)
    sums.total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sums.loss, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def test_parameter_names(build: Callable[..., Decoder]) -> None:
    llama = {"attn_norm", "attn.wq", "attn.wk", "attn.wv", "attn.q_norm", "attn.k_norm", "attn.wo", "mlp_norm",
             "mlp.gate", "mlp.up", "mlp.down"}  # fmt: skip
    names = [name for name, _ in build(qk_norm=True, layers=1).named_parameters()]
    assert set(names) == {"embed.weight", "norm.weight", "head.weight"} | {f"blocks.0.{n}.weight" for n in llama}
    tied = build(**GPT2, layers=1)
    names = [name for name, _ in tied.named_parameters()]
    assert names[:2] == ["embed.weight", "pos.weight"]
    assert "head.weight" not in names
    assert "head.bias" not in names
    assert {"blocks.0.attn.wo.bias", "blocks.0.mlp.up.bias", "blocks.0.attn_norm.bias", "norm.bias"} < set(names)
    assert tied.head.weight is tied.embed.weight
    assert not list(tied.buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str, build: Callable[..., Decoder]) -> None:
    model = build(**KINDS[kind])
    _, grads = loss_and_gradients(model, batch())
    for name, _ in model.named_parameters():
        if name.endswith("wk.bias"):  # it adds the same to all scores of a query, which softmax removes
            continue
        assert grads[name].isfinite().all(), name
        assert grads[name].abs().max() > 1e-4, name


def test_the_loss_is_that_of_the_logits(build: Callable[..., Decoder]) -> None:
    model, inputs = build(), batch()
    logits = model(inputs["tokens"], inputs["documents"])
    assert logits.shape == (2, 24, 97)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten(), reduction="sum")
    torch.testing.assert_close(model(**inputs).loss, expected.detach())


def test_initialisation_is_a_function_of_seed_and_name(section: Callable[..., DecoderSection]) -> None:
    built = build_model(section(dim=64, layers=8))

    def draw(name: str, seed: int = 3) -> Tensor:
        tensor = torch.empty_like(built.module.get_parameter(name))
        built.initialise(name, tensor, torch.Generator().manual_seed(seed))
        return tensor

    first = draw("blocks.0.attn.wq.weight")
    torch.manual_seed(1)  # the global generator must not matter
    assert torch.equal(first, draw("blocks.0.attn.wq.weight"))
    assert not torch.equal(first, draw("blocks.0.attn.wq.weight", seed=4))
    assert first.std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("blocks.3.attn.wo.weight", "blocks.3.mlp.down.weight"):
        assert draw(name).std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert draw("head.weight").std().item() == pytest.approx(0.02, rel=0.05)


def test_norms_begin_at_one_and_biases_at_zero(build: Callable[..., Decoder]) -> None:
    for name, parameter in build(**GPT2, qk_norm=True).named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            assert parameter.std() > 0.05, name


@pytest.mark.parametrize("kind", KINDS)
def test_meta_allocates_nothing_and_materialises_whole(kind: str, section: Callable[..., DecoderSection]) -> None:
    with torch.device("meta"):
        built = build_model(section(**KINDS[kind]))
        model = built.module
        assert all(p.is_meta for p in model.parameters())
        assert model(torch.zeros(2, 9, dtype=torch.int64)).is_meta
    names = [name for name, _ in model.named_parameters()]
    model.to_empty(device="cpu")
    assert [name for name, _ in model.named_parameters()] == names  # still tied
    for name, parameter in model.named_parameters():
        built.initialise(name, parameter, torch.Generator().manual_seed(0))
    assert model(**batch()).loss.isfinite()


def test_dropout_only_in_training(build: Callable[..., Decoder]) -> None:
    inputs = batch()["tokens"]
    plain, dropping = build(), build(dropout=0.3)
    assert not torch.allclose(dropping(inputs), plain(inputs), atol=1e-2)
    torch.testing.assert_close(dropping.eval()(inputs), plain(inputs))


def test_more_tokens_than_positions_is_an_error(build: Callable[..., Decoder]) -> None:
    with pytest.raises(ValueError, match="65 tokens, but learned positions for 64"):
        build(position="learned")(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_bit(kind: str, documents: bool, build: Callable[..., Decoder]) -> None:
    model, inputs = build(**KINDS[kind]), batch()
    if not documents:
        del inputs["documents"]
    loss, grads = loss_and_gradients(model, inputs)
    model.zero_grad()
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, f=forward: checkpoint(f, *args, use_reentrant=False)
    again, grads_again = loss_and_gradients(model, inputs)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize(
    ("documents", "backend"),
    [(False, "aot_eager"), (True, "aot_eager"), pytest.param(True, "inductor", marks=pytest.mark.full)],
)
def test_blocks_compile_whole(documents: bool, backend: str, build: Callable[..., Decoder]) -> None:
    """fullgraph: any graph break is an error. Loss and gradients agree to 1e-5 of their size. (inductor takes 30 s.)"""
    torch._dynamo.reset()
    model, inputs = build(qk_norm=True), batch()
    if not documents:
        del inputs["documents"]
    loss, grads = loss_and_gradients(model, inputs)
    model.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):  # the second block must run the first one's code
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)
        compiled_loss, compiled_grads = loss_and_gradients(model, inputs)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    assert grads.keys() == compiled_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(compiled_grads[name], grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item())


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group with this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Decoder, dtype: torch.dtype | None = None) -> Decoder:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    units = model.shard_units()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_units_give_the_same_bits(kind: str, one_rank: None, build: Callable[..., Decoder]) -> None:
    model, inputs = build(**KINDS[kind]), batch()
    expected, grads = loss_and_gradients(copy.deepcopy(model), inputs)
    loss, sharded_grads = loss_and_gradients(sharded(model), inputs)
    assert torch.equal(loss, expected)
    assert grads.keys() == sharded_grads.keys()
    assert all(torch.equal(sharded_grads[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_casts_weights_and_not_positions(
    kind: str, one_rank: None, build: Callable[..., Decoder]
) -> None:
    """Under FSDP with bf16 it computes the same bits as the model in bf16, and rotary tables stay fp32."""
    seen: list[torch.dtype] = []
    model, inputs = build(**KINDS[kind]), batch()
    expected = copy.deepcopy(model).bfloat16()(**inputs).loss
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda _, args: seen.extend(table.dtype for table in args[1].rope or ()))
    loss, grads = loss_and_gradients(sharded(model, torch.bfloat16), inputs)
    assert torch.equal(loss, expected)
    assert loss.dtype == torch.float32
    assert set(seen) <= {torch.float32}
    assert bool(seen) == (model.section.position == "rope")
    assert {g.dtype for g in grads.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_on_meta_then_materialised(kind: str, one_rank: None, build: Callable[..., Decoder]) -> None:
    """As an engine does. A tied weight must be one parameter from the start."""
    whole = build(**KINDS[kind])
    with torch.device("meta"):
        model = build_model(whole.section).module
    assert isinstance(model, Decoder)
    sharded(model).to_empty(device="cpu")
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in whole.named_parameters()]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            parameter.to_local().copy_(whole.get_parameter(name))
    expected, grads = loss_and_gradients(whole, batch())
    loss, sharded_grads = loss_and_gradients(model, batch())
    assert torch.equal(loss, expected)
    assert all(torch.equal(sharded_grads[name], grad) for name, grad in grads.items())


def test_units_cover_every_parameter_once(section: Callable[..., DecoderSection]) -> None:
    for kind in KINDS.values():
        built = build_model(section(**kind))
        model = built.module
        assert isinstance(model, Decoder)
        assert list(built.blocks) == list(model.blocks)
        in_units = [id(p) for unit in built.units for module in unit for p in module.parameters()]
        assert len(in_units) == len(set(in_units))
        left = {name for name, p in model.named_parameters() if id(p) not in in_units}
        tied = {"embed.weight", "norm.weight", "norm.bias", "pos.weight"}
        assert left <= (tied if model.section.tie_embeddings else set())
