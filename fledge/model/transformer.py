"""The transformer: a decoder-only language model with Hugging Face's parameter names.

RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020),
grouped-query attention (Ainslie et al. 2023), normalised queries and keys in the qwen3 family.

Shape suffixes: B rows, T tokens, S keys, C model width, H query heads, G key-value heads,
D head size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fledge.model.config import ModelConfig
from fledge.model.rope import scaled_frequencies

# Above this many keys the fused kernel wins on a CPU; below, plain matrix products do.
EXPLICIT_ATTENTION_KEYS = 512


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; the result has the input's type."""
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(
            x.dtype
        )


def rotary_angles(
    config: ModelConfig, positions_BT: Tensor, lengths_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, T, D) of the rotary embedding, fp32; the first half of the sines is negative.

    `lengths_B` (by default the last position + 1) is how long each sequence is, which a dynamic rope needs.
    """
    scaling, factor = config.rope_scaling, 1.0
    if scaling is None:
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions_BT.device)
        inverse = config.rope_theta ** (-pairs / config.head_dim)
    else:
        lengths_B = positions_BT.amax(1) + 1 if lengths_B is None else lengths_B
        longest = config.max_position_embeddings
        inverse, factor = scaled_frequencies(scaling, config.rope_theta, config.head_dim, longest, lengths_B)
    angles_BTP = positions_BT[..., None].float() * inverse
    turn = _kept_cos_sin if torch.compiler.is_compiling() else _cos_sin
    cos_BTD, sin_BTD = turn(angles_BTP, factor)
    return cos_BTD[:, None], sin_BTD[:, None]


def _cos_sin(angles_BTP: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    cos_BTP, sin_BTP = angles_BTP.cos() * factor, angles_BTP.sin() * factor
    return torch.cat([cos_BTP, cos_BTP], dim=-1), torch.cat([-sin_BTP, sin_BTP], dim=-1)


# For the compiler an operation whose inside it doesn't see: else it would compute every sine again for each
# head of each layer, forward and backward, a tenth of a step's time on a CPU.
_kept_cos_sin = torch.library.custom_op("fledge::cos_sin", _cos_sin, mutates_args=())


@_kept_cos_sin.register_fake
def _(angles_BTP: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    shape = (*angles_BTP.shape[:-1], 2 * angles_BTP.shape[-1])
    return angles_BTP.new_empty(shape), angles_BTP.new_empty(shape)


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[d], x[d + D/2]) by its position's angle."""
    x32 = x_BHTD.float()
    swapped = x32.view(*x32.shape[:-1], 2, -1).flip(-2).flatten(-2)
    return (x32 * cos + swapped * sin).to(x_BHTD.dtype)


def attend(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention over the keys that `visible` (B or 1, 1, T, S; bool) allows; softmax in fp32. None:
    of as many keys as queries those up to each. A GPU's fastest kernels know that order, but take no mask."""
    H, D = q_BHTD.shape[1], q_BHTD.shape[3]
    G, S = k_BGSD.shape[1], k_BGSD.shape[2]
    if visible is None:
        return F.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=H != G)
    if q_BHTD.device.type != "cpu" or S > EXPLICIT_ATTENTION_KEYS:
        return F.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, attn_mask=visible, enable_gqa=H != G)
    if H != G:
        k_BGSD, v_BGSD = k_BGSD.repeat_interleave(H // G, dim=1), v_BGSD.repeat_interleave(H // G, dim=1)
    scores_BHTS = (q_BHTD @ k_BGSD.transpose(-1, -2)).float() / math.sqrt(D)
    weights_BHTS = scores_BHTS.masked_fill(~visible, -math.inf).softmax(-1).to(v_BGSD.dtype)
    return weights_BHTS @ v_BGSD


class Attention(nn.Module):
    """Grouped-query self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=config.has_qkv_bias)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=config.has_qkv_bias)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=config.has_qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=config.attention_bias)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.has_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.has_qk_norm else nn.Identity()

    def forward(self, x_BTC: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, _ = x_BTC.shape
        q_BHTD = self.q_norm(self.q_proj(x_BTC).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k_BGTD = self.k_norm(self.k_proj(x_BTC).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v_BGTD = self.v_proj(x_BTC).view(B, T, -1, self.head_dim).transpose(1, 2)
        q_BHTD, k_BGTD = rotate(q_BHTD, *rope), rotate(k_BGTD, *rope)
        out_BHTD = attend(q_BHTD, k_BGTD, v_BGTD, visible)
        out_BTC: Tensor = self.o_proj(out_BHTD.transpose(1, 2).reshape(B, T, -1))
        return out_BTC


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(C, inner, bias=bias)
        self.up_proj = nn.Linear(C, inner, bias=bias)
        self.down_proj = nn.Linear(inner, C, bias=bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out_BTC: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))
        return out_BTC


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x_BTC = x_BTC + self.self_attn(self.input_layernorm(x_BTC), rope, visible)
        out_BTC: Tensor = x_BTC + self.mlp(self.post_attention_layernorm(x_BTC))
        return out_BTC


@torch.no_grad()
def init_weights(module: nn.Module, generator: torch.Generator, table_std: float) -> None:
    """Fresh weights for blocks and what holds them: N(0, 1/fan_in) for hidden matrices, zero for the two
    projections that write to the residual stream (a block starts as the identity), N(0, table_std) for
    embeddings."""
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        else:
            is_hidden = ".self_attn." in name or ".mlp." in name
            std = parameter.shape[1] ** -0.5 if is_hidden else table_std
            parameter.normal_(0.0, std, generator=generator)


class Trunk(nn.Module):
    """Embedding, blocks and final norm (`model.*` in a checkpoint)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A language model: ids in, a score for every token of the vocabulary out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Whether training keeps only the blocks' inputs and computes the rest again (Chen et al. 2016).
        self.checkpoint_activations = False
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights (see `init_weights`)."""
        init_weights(self, generator, self.config.initializer_range)

    def num_parameters(self) -> int:
        """Weights, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, input_ids_BT: Tensor, positions_BT: Tensor, visible: Tensor | None) -> Tensor:
        """The trunk's output (B, T, C). `visible` says which keys may be seen but for the layers' windows;
        None, without windows: all up to each token (see `attend`)."""
        x_BTC = self.model.embed_tokens(input_ids_BT)
        rope = rotary_angles(self.config, positions_BT)
        near = self._within_window(positions_BT, visible)
        for layer, block in enumerate(self.model.layers):
            seen = visible if self.config.window(layer) is None else near
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_BTC = checkpoint(block, x_BTC, rope, seen, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTC = block(x_BTC, rope, seen)
        out: Tensor = self.model.norm(x_BTC)
        return out

    def _within_window(self, positions_BT: Tensor, visible: Tensor | None) -> Tensor | None:
        """`visible` without the keys that are too far back for a layer with a window."""
        window = self.config.sliding_window
        if window is None or visible is None or visible.shape[-1] <= window:
            return visible
        return visible & (positions_BT[:, None, :] > positions_BT[:, :, None] - window)[:, None]

    def forward(self, input_ids_BT: Tensor, segment_ids_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of whole rows, read as `hidden_rows` does."""
        logits_BTV: Tensor = self.lm_head(self.hidden_rows(input_ids_BT, segment_ids_BT))
        return logits_BTV

    def hidden_rows(self, input_ids_BT: Tensor, segment_ids_BT: Tensor | None = None) -> Tensor:
        """The trunk's output (B, T, C) of whole rows. Tokens see earlier tokens of their own segment only,
        and positions count from each segment's start."""
        T = input_ids_BT.shape[1]
        index_T = torch.arange(T, device=input_ids_BT.device)
        positions_BT = index_T[None]
        if segment_ids_BT is None and index_T.device.type != "cpu" and self.config.sliding_window is None:
            return self.hidden(input_ids_BT, positions_BT, None)
        visible = (index_T[:, None] >= index_T[None, :])[None, None]
        if segment_ids_BT is not None:
            visible = visible & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
            starts = F.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], (1, 0), value=True)
            positions_BT = index_T[None] - torch.where(starts, index_T[None], 0).cummax(dim=1).values
        return self.hidden(input_ids_BT, positions_BT, visible)
