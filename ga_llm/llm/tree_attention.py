"""Attention for exact ranking: few new tokens that see a long key-value cache through a mask.

On a CPU the kernel behind SDPA is made for many queries; for few, two matrix products and a softmax take about two
thirds of its time. Everywhere else, and for many queries, it is SDPA.
"""
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE = "tree"       # what `attn_implementation` calls it
FEW = 512           # queries


def tree_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """query (B, H, M, D); key, value (B, H_kv, S, D), after RoPE; attention_mask (B, 1, M, S), additive; None: causal.

    A mask of True and False is one that transformers has made, for a sliding window. Returns (B, M, H, D) and None, as
    transformers expects. Grouped queries share their key's product.
    """
    batch, heads, length, size = query.shape
    additive = attention_mask is not None and attention_mask.dtype != torch.bool
    if not additive or length > FEW or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = (query * (size ** -0.5 if scaling is None else scaling)).reshape(batch, key.shape[1], -1, size)
    scores = (grouped @ key.transpose(2, 3)).view(batch, key.shape[1], -1, length, key.shape[2])
    scores += attention_mask.unsqueeze(2)
    weights = scores.softmax(-1).view(batch, key.shape[1], -1, key.shape[2])
    return (weights @ value).view(batch, heads, length, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(TREE, tree_attention)
AttentionMaskInterface.register(TREE, sdpa_mask)
