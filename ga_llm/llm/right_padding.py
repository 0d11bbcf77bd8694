"""Full attention through SDPA over batches that are padded on the right, as training's are.

No token looks to its right, so causality alone hides the padding. Then SDPA's causal kernels serve, which leave out
what lies above the diagonal; with a mask they would compute all of it.
"""
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

RIGHT_PADDED = "right_padded"       # what `attn_implementation` calls it


def causality_hides(mask: torch.Tensor | None, q_length: int, kv_length: int) -> bool:
    """Whether causality alone will do; mask (B, keys) bool, True where there is a token, or None: no padding."""
    return q_length == kv_length and (mask is None or not (mask[:, 1:] & ~mask[:, :-1]).any())


def right_padded_mask(batch_size, q_length, kv_length, attention_mask=None, **kwargs):
    """The AttentionMaskInterface function: as SDPA's, but right padding is no reason for a mask."""
    if causality_hides(attention_mask, q_length, kv_length):
        attention_mask = None
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(RIGHT_PADDED, sdpa_attention_forward)
AttentionMaskInterface.register(RIGHT_PADDED, right_padded_mask)
