"""A model as the engine reads with it: `CausalLM`'s mathematics without gradients, in few large operations.

Queries, keys and values come from one product, gates and inner values too; masks, rotations and the places
in the cache are worked out once a pass and not in every layer. The halves of queries and keys are interleaved
(in the weights, once), so that a rotary pair is a complex number and its rotation one multiplication. A test
compares it with `CausalLM`.

Shape suffixes: B rows, T tokens, N flattened positions (B * T, or those that are no padding), S cache slots,
C model width, H query heads, G key-value heads, R = H / G, D head size, P = H + 2G, E = H + G, M = 2G,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.engine.products import Product, product
from fledge.errors import UserError
from fledge.model.config import ModelConfig
from fledge.model.kv_cache import KVCache
from fledge.model.lora import LoRALinear
from fledge.model.transformer import Block, CausalLM, RMSNorm, rotary_angles

# Rotations are kept for this many positions at least.
KEPT_POSITIONS = 1024
# Where at least this share of a pass is padding, only attention sees it.
PADDING_SHARE = 0.1

# Of a layer: queries (B, H, T, D), keys and values side by side (B, T, M, D) -> (B, H, T, D).
Attention = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    """A block's weights; `head_scale_ED` is that of queries and keys, where the family normalises them."""

    attention_scale_C: Tensor
    queries_keys_values: Product
    head_scale_ED: Tensor | None
    attention_out: Product
    mlp_scale_C: Tensor
    gate_up: Product
    down: Product


class Decoder:
    """Reads tokens with a model's weights, laid out for it.

    It is good until the model is trained further: what needs no other layout is not copied.

    All calls belong under `torch.inference_mode`."""

    @torch.inference_mode()
    def __init__(self, model: CausalLM, dtype: torch.dtype | None = None) -> None:
        """`dtype` is what weights are held in (see `product`; None: their own type); what stands between the
        products is fp32."""
        self.config = model.config
        trunk = model.model
        self._embedding_VC = trunk.embed_tokens.weight.detach()
        self._scale_C = _scale(trunk.norm)
        self._layers = [_layer(cast(Block, block), self.config, dtype) for block in trunk.layers]
        self._head = product([model.lm_head.weight], [None], dtype)
        self.device = self._embedding_VC.device
        self.cache_dtype = cache_dtype(self.device, dtype or self._embedding_VC.dtype)
        self._turns = torch.empty(0, 1)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `slots` tokens."""
        return KVCache(self.config, batch, slots, self.cache_dtype, self.device)

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """Scores (N, V), fp32."""
        return self._head(hidden_NC).float()

    def hidden(self, ids_BT: Tensor, positions_BT: Tensor, visible: Tensor) -> Tensor:
        """The trunk's output (B, T, C) of tokens that see each other by `visible` (B or 1, T, T; bool)."""
        masks = self._masks(visible, positions_BT, positions_BT)
        G = self.config.num_key_value_heads

        def attention(layer: int, q_BHTD: Tensor, kv_BTMD: Tensor) -> Tensor:
            q_BHTD, kv_BMTD = (x.to(self.cache_dtype) for x in (q_BHTD, kv_BTMD.transpose(1, 2)))
            return _attend(q_BHTD, kv_BMTD[:, :G], kv_BMTD[:, G:], masks[layer])

        return self._run(ids_BT, self._turns_at(positions_BT, int(positions_BT.max()) + 1, None), attention)

    def extend(self, ids_BT: Tensor, new_lengths_B: Tensor, cache: KVCache) -> Tensor:
        """Read up to T new tokens a row behind what the cache holds; rows are right-padded, row b has
        `new_lengths_B[b]` of them. Returns the trunk's output (B, T, C); pads' outputs mean nothing."""
        T, G = ids_BT.shape[1], self.config.num_key_value_heads
        real_N = None
        if T > 1 and int(new_lengths_B.sum()) <= (1 - PADDING_SHARE) * ids_BT.numel():
            is_real_BT = torch.arange(T, device=self.device) < new_lengths_B[:, None]
            real_N = is_real_BT.flatten().nonzero()[:, 0]
        shortest, longest = (int(x) for x in cache.lengths_B.aminmax())
        slots = min(longest + T, cache.slots)
        positions_BT = cache.lengths_B[:, None] + torch.arange(T, device=self.device)
        positions_BT = positions_BT.clamp(max=cache.slots)
        is_even = shortest == longest and longest + T <= cache.slots
        places = slice(longest, longest + T) if is_even else cache.places(positions_BT)
        masks: list[Tensor | None] = [None] * len(self._layers)
        if T > 1 or not is_even or self.config.layer_types:
            slots_S = torch.arange(slots, device=self.device)
            masks = self._masks(slots_S <= positions_BT[:, :, None], positions_BT, slots_S[None])
        lengths_B = cache.lengths_B + new_lengths_B

        def attention(layer: int, q_BHTD: Tensor, kv_BTMD: Tensor) -> Tensor:
            held_BMSD = cache.put(layer, kv_BTMD, places)[:, :, :slots]
            return _attend(q_BHTD.to(held_BMSD.dtype), held_BMSD[:, :G], held_BMSD[:, G:], masks[layer])

        turns = self._turns_at(positions_BT, longest + T, lengths_B)
        hidden_BTC = self._run(ids_BT, turns, attention, real_N)
        cache.lengths_B = lengths_B
        return hidden_BTC

    def step(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """Read one token a row; scores (B, V) of the next, fp32."""
        return self.logits(self.extend(ids_B[:, None], torch.ones_like(ids_B), cache)[:, 0])

    def _run(
        self, ids_BT: Tensor, turns: Tensor, attention: Attention, real_N: Tensor | None = None
    ) -> Tensor:
        """The trunk's output; `turns` as `_turns_at` gives them. `real_N`: which of the B * T tokens are no
        padding (None: all); the rest get zeros as keys, values and output."""
        B, T = ids_BT.shape
        H, G, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        eps = self.config.rms_norm_eps

        def real(x: Tensor) -> Tensor:
            x = x.flatten(0, 1)
            return x if real_N is None else x[real_N]

        def padded(x_NO: Tensor) -> Tensor:
            if real_N is None:
                return x_NO
            return x_NO.new_zeros(B * T, x_NO.shape[-1]).index_copy_(0, real_N, x_NO)

        ids_N, turns_N = real(ids_BT), real(turns.expand(B, -1, -1, -1))
        x_NC = F.embedding(ids_N, self._embedding_VC).float()
        for number, layer in enumerate(self._layers):
            heads_NO = layer.queries_keys_values(_normed(x_NC, layer.attention_scale_C, eps)).float()
            turned_NED = heads_NO.view(-1, H + 2 * G, D)[:, : H + G]  # changed in place
            if layer.head_scale_ED is not None:
                turned_NED.copy_(_normed(turned_NED, layer.head_scale_ED, eps))
            torch.view_as_complex(turned_NED.view(-1, H + G, D // 2, 2)).mul_(turns_N)
            heads_BTPD = padded(heads_NO).view(B, T, H + 2 * G, D)
            out_BHTD = attention(number, heads_BTPD[:, :, :H].transpose(1, 2), heads_BTPD[:, :, H:])
            x_NC = x_NC + layer.attention_out(real(out_BHTD.transpose(1, 2).reshape(B, T, H * D)))
            gate_NI, inner_NI = layer.gate_up(_normed(x_NC, layer.mlp_scale_C, eps)).chunk(2, dim=-1)
            x_NC = x_NC + layer.down(F.silu(gate_NI).mul_(inner_NI))
        return padded(_normed(x_NC, self._scale_C, eps)).view(B, T, -1)

    def _turns_at(self, positions_BT: Tensor, end: int, lengths_B: Tensor | None) -> Tensor:
        """The rotation of each pair at each position (B, T, 1, D / 2), complex. Positions are below `end`;
        for `lengths_B` see `rotary_angles`."""
        scaling, half = self.config.rope_scaling, self.config.head_dim // 2
        if scaling is not None and scaling.rope_type == "dynamic":  # it changes with the length
            cos_B1TD, sin_B1TD = rotary_angles(self.config, positions_BT, lengths_B)
            return torch.complex(cos_B1TD[..., :half], sin_B1TD[..., half:]).transpose(1, 2)
        if end > len(self._turns):
            index_1S = torch.arange(max(KEPT_POSITIONS, 2 * end), device=self.device)[None]
            cos_11SD, sin_11SD = rotary_angles(self.config, index_1S)
            self._turns = torch.complex(cos_11SD[0, 0, :, :half], sin_11SD[0, 0, :, half:])
        return self._turns[positions_BT][:, :, None]

    def _masks(self, visible: Tensor, positions_BT: Tensor, keys_BS: Tensor) -> list[Tensor | None]:
        """What each layer adds to the scores (B, 1, T, S): -inf for a key that is not seen. `keys_BS` are the
        keys' positions."""
        window = self.config.sliding_window
        near = visible
        if window is not None:
            near = visible & (keys_BS[:, None, :] > positions_BT[:, :, None] - window)
        full, short = (
            torch.zeros(seen.shape, dtype=self.cache_dtype, device=self.device).masked_fill_(~seen, -math.inf)
            for seen in (visible, near)
        )
        layers = range(len(self._layers))
        return [(full if self.config.window(layer) is None else short)[:, None] for layer in layers]


def cache_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are kept in: a CPU reads fp32 faster than it computes with bf16."""
    return torch.float32 if device.type == "cpu" else dtype


def _layer(block: Block, config: ModelConfig, dtype: torch.dtype | None) -> _Layer:
    attention, mlp = block.self_attn, block.mlp
    for module in block.modules():  # an adapter's layer has a weight too: the one without the adapter
        if isinstance(module, LoRALinear):
            raise UserError("the model has adapters beside its weights; merge them first")

    def joined(*modules: nn.Linear) -> Product:
        return product([m.weight for m in modules], [m.bias for m in modules], dtype)

    def interleaved(weight: Tensor) -> Tensor:
        """With the outputs d and d + D / 2 of each head side by side."""
        heads = weight.detach().view(-1, 2, config.head_dim // 2, *weight.shape[1:])
        return heads.transpose(1, 2).reshape(weight.shape)

    turned, v_proj = (attention.q_proj, attention.k_proj), attention.v_proj
    weights = [*(interleaved(m.weight) for m in turned), v_proj.weight]
    biases = [*(None if m.bias is None else interleaved(m.bias) for m in turned), v_proj.bias]
    head_scale_ED = None
    if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
        q_scale, k_scale = (interleaved(_scale(norm)) for norm in (attention.q_norm, attention.k_norm))
        rows = (
            q_scale.expand(config.num_attention_heads, -1),
            k_scale.expand(config.num_key_value_heads, -1),
        )
        head_scale_ED = torch.cat(rows)
    return _Layer(
        _scale(block.input_layernorm),
        product(weights, biases, dtype),
        head_scale_ED,
        joined(attention.o_proj),
        _scale(block.post_attention_layernorm),
        joined(mlp.gate_proj, mlp.up_proj),
        joined(mlp.down_proj),
    )


def _scale(norm: RMSNorm) -> Tensor:
    """A norm's weights as `_normed` takes them."""
    weight = norm.weight.detach().float()
    return weight * math.sqrt(weight.shape[-1])


def _normed(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, with the root of the size in `scale`: on few rows half the time of PyTorch's."""
    return x * (x * x).sum(-1, keepdim=True).add_(x.shape[-1] * eps).rsqrt_() * scale


def _attend(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention (B, H, T, D)."""
    B, H, T, D = q_BHTD.shape
    G = k_BGSD.shape[1]
    if T > 1 or H == G:
        return F.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, attn_mask=mask, enable_gqa=H != G)
    # The heads of a group are the rows of one product: no key is copied.
    q_BGRD = q_BHTD.reshape(B, G, H // G, D)
    return F.scaled_dot_product_attention(q_BGRD, k_BGSD, v_BGSD, attn_mask=mask).reshape(B, H, T, D)
