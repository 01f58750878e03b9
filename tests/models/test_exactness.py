"""The decoder computes what the real implementations in `transformers` compute, from the same weights.

In fp32, logits of size up to 4 agree to 1e-5 (seen: 2.5e-6 at most), and so do gradients of the mean loss. The
operations are the same, but in another order.
"""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from configs.schema.model import DecoderSection, RopeScaling
from models import Decoder, build_model
from models.decoder import make_norm

TOLERANCE = 1e-5
SEQ_LEN = 48

BASE: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "initializer_range": 0.1,
    "tie_word_embeddings": False, "attn_implementation": "eager",
}  # fmt: skip
OURS: dict[str, Any] = {
    "vocab_size": 101, "dim": 64, "layers": 3, "heads": 4, "kv_heads": 2, "mlp_dim": 112, "max_seq_len": 128
}  # fmt: skip

LLAMA_NAMES = {
    "model.embed_tokens.": "embed.", "model.layers.": "blocks.", "model.norm.": "norm.", "lm_head.": "head.",
    ".input_layernorm.": ".attn_norm.", ".post_attention_layernorm.": ".mlp_norm.", ".self_attn.": ".attn.",
    ".q_proj.": ".wq.", ".k_proj.": ".wk.", ".v_proj.": ".wv.", ".o_proj.": ".wo.",
    ".gate_proj.": ".gate.", ".up_proj.": ".up.", ".down_proj.": ".down.",
}  # fmt: skip
GPT2_NAMES = {
    "transformer.wte.": "embed.", "transformer.wpe.": "pos.", "transformer.h.": "blocks.", "transformer.ln_f.": "norm.",
    "lm_head.": "head.", ".ln_1.": ".attn_norm.", ".ln_2.": ".mlp_norm.", ".attn.c_proj.": ".attn.wo.",
    ".mlp.c_fc.": ".mlp.up.", ".mlp.c_proj.": ".mlp.down.",
}  # fmt: skip


def renamed(name: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def llama_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {renamed(name, LLAMA_NAMES): tensor for name, tensor in tensors.items()}


def gpt2_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 stores its matrices transposed, and query, key and value in one."""
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.T if name.endswith("weight") and ".c_" in name else tensor
        if ".c_attn." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                weights[renamed(name, GPT2_NAMES).replace("c_attn", f"w{part}")] = piece
        else:
            weights[renamed(name, GPT2_NAMES)] = tensor
    return weights


def llama() -> tuple[hf.PreTrainedModel, dict[str, Any]]:
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = hf.LlamaConfig(**BASE, rope_parameters={**rope, "original_max_position_embeddings": 32})
    scaling = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq_len=32)
    return hf.LlamaForCausalLM(config), {"rope_theta": 500.0, "rope_scaling": scaling}


def llama2_tied() -> tuple[hf.PreTrainedModel, dict[str, Any]]:
    config = hf.LlamaConfig(**{**BASE, "num_key_value_heads": 4, "tie_word_embeddings": True})
    return hf.LlamaForCausalLM(config), {"kv_heads": None, "tie_embeddings": True}


def mistral() -> tuple[hf.PreTrainedModel, dict[str, Any]]:
    return hf.MistralForCausalLM(hf.MistralConfig(**BASE, sliding_window=7)), {"sliding_window": 7}


def qwen2() -> tuple[hf.PreTrainedModel, dict[str, Any]]:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**BASE)), {"qkv_bias": True}


def qwen3() -> tuple[hf.PreTrainedModel, dict[str, Any]]:
    config = hf.Qwen3Config(**BASE, head_dim=24, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    return hf.Qwen3ForCausalLM(config), {"qk_norm": True, "head_dim": 24, "rope_theta": 1e6}


def gpt2() -> tuple[hf.PreTrainedModel, dict[str, Any]]:
    config = hf.GPT2Config(
        vocab_size=101, n_embd=64, n_inner=112, n_layer=3, n_head=4, n_positions=128, initializer_range=0.1,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ours = {"norm": "layernorm", "mlp": "gelu_tanh", "position": "learned", "tie_embeddings": True, "kv_heads": None}
    return hf.GPT2LMHeadModel(config), {**ours, "qkv_bias": True, "out_bias": True, "mlp_bias": True}


FAMILIES: list[Any] = [llama, llama2_tied, mistral, qwen2, qwen3, gpt2]


def ours_named(family: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return gpt2_weights(tensors) if family is gpt2 else llama_weights(tensors)


def pair(family: Any) -> tuple[hf.PreTrainedModel, Decoder]:
    """A random model of `transformers`, with random norms and biases, and ours with its weights."""
    torch.manual_seed(0)
    theirs, overrides = family()
    for name, parameter in theirs.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.3)
    ours = build_model(DecoderSection(**{**OURS, **overrides})).module
    assert isinstance(ours, Decoder)
    ours.load_state_dict(ours_named(family, theirs.state_dict()), strict=True)
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("family", FAMILIES, ids=[f.__name__ for f in FAMILIES])
def test_logits_loss_and_gradients_are_those_of_transformers(family: Any) -> None:
    theirs, ours = pair(family)
    tokens, targets = torch.randint(0, 101, (2, 2, SEQ_LEN))
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=TOLERANCE)

    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    loss.backward()
    total = ours(tokens, targets=targets).total / targets.numel()
    total.backward()
    torch.testing.assert_close(total, loss, rtol=1e-6, atol=0)
    expected_grads = ours_named(family, {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert grads.keys() == {n for n, _ in ours.named_parameters()}
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        error = (grad - expected_grads[name]).abs().max().item()
        assert error <= TOLERANCE, f"{name}: {error}"


@pytest.mark.parametrize("family", FAMILIES, ids=[f.__name__ for f in FAMILIES])
def test_in_bf16_it_is_as_near_to_fp32_as_transformers(family: Any) -> None:
    """Rounding differs. The root mean square error against fp32 is at most 1.1 times that of `transformers`."""
    theirs, ours = pair(family)
    tokens = torch.randint(0, 101, (4, SEQ_LEN))
    with torch.no_grad():
        exact = theirs(tokens).logits
        their_error = theirs.bfloat16()(tokens).logits.float() - exact
        our_error = ours.bfloat16()(tokens).float() - exact
    assert our_error.square().mean().sqrt() <= 1.1 * their_error.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_llamas(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    ours = make_norm("rmsnorm", 64, 1e-5).to(dtype)
    torch.nn.init.normal_(theirs.weight, 1.0, 0.3)
    ours.load_state_dict(theirs.state_dict())
    x = (3 * torch.randn(5, 7, 64)).to(dtype)
    # bf16: theirs rounds once more, before the weight; one step of bf16 is 2^-8.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)
