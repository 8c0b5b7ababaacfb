"""The attention of a mixture of experts: the part of a layer that all tokens share."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache


class Attention(nn.Module):
    """Causal self-attention of one layer."""

    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = heads, layer
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch length width"], past: Cache | None) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        if past is not None:
            key, value = past.update(key, value, self.layer)
        if query.shape[2] == key.shape[2]:
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:  # query i reads the cache and the tokens up to itself
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=x.device)
            mask = mask.tril(key.shape[2] - query.shape[2])
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out
