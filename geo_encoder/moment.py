"""`<TIME n>`: a check-in's weekday, half hour and time since the one before, as a vector of the LLM's width.

The tokens are injected like those of the places, by an encoder that stage 2 trains: a sum of three small tables.
Not in the paper, whose prompts spell times in text.
"""
import numpy as np
import torch
from torch import nn

from ga_llm.base.prompts import GAPS, HALF_HOURS, MOMENTS
from geo_encoder.injection import Injection


class MomentEncoder(nn.Module):
    """(N, 3) of weekday (Monday is 0), half hour and step of time since the check-in before to (N, hidden size)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hour = nn.Embedding(7 * 24, hidden_size)           # of the week
        self.half_hour = nn.Embedding(2 * HALF_HOURS, hidden_size)      # of a workday, of a day of the weekend
        self.gap = nn.Embedding(GAPS, hidden_size)
        for table in self.children():
            nn.init.normal_(table.weight, std=.02)

    def forward(self, moments: torch.Tensor) -> torch.Tensor:
        day, half_hour, gap = moments.unbind(-1)
        return (self.hour(day * 24 + half_hour // 2) + self.half_hour(half_hour + HALF_HOURS * (day >= 5))
                + self.gap(gap))


def moment_injection(hidden_size: int, token_ids: np.ndarray) -> Injection:
    """Injection of the `<TIME n>` tokens, (`MOMENTS`,), by an encoder that has learned nothing."""
    number = torch.arange(MOMENTS)
    moments = torch.stack([number // (HALF_HOURS * GAPS), number // GAPS % HALF_HOURS, number % GAPS], dim=-1)
    return Injection(MomentEncoder(hidden_size), moments, token_ids)
