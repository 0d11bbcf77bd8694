"""The pointer: the next place is often one of the prompt's, and which one is a question of time and distance.

    P(place) = g · P_LLM(place) + (1 - g) · P_pointer(place)

Not in the paper. Attention heads point from where a place is asked for to the check-ins before it: queries are the
LLM's hidden state there, keys its states at the check-ins' `<GPS n>`, and each pair of them has learned biases for what
an LLM hardly reads from text: how far apart the times of day are, and the kinds of day; how long ago; how far the place
is from the last one, and whether that was the same before both; what their trajectories have in common. The heads'
weights are added up by place, and what the last visit to a place tells is added. The gate g and the mixture over heads
are functions of the state, too. Pointing into the input and mixing with a vocabulary: See et al. (arXiv 1704.04368),
Merity et al. (arXiv 1609.07843).
"""
import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ga_llm.base.prompts import HALF_HOURS, MONDAY
from geo_encoder.encoder import Dropout
from geo_encoder.gps_tokens import GPSMapping

DAY, MINUTE, HOUR = 86400, 60., 3600.
RECENCY = HOUR * torch.tensor([.25, .5, 1, 2, 4, 8, 14, 22, 26, 36, 48, 72, 120, 168, 240, 336, 504, 720, 1080, 1440,
                               2160, 2880, 4320])
GAP = MINUTE * torch.tensor([5., 30, 120, 480, 1440, 5760, 20160])      # since the check-in before
KM = torch.tensor([.001, .1, .25, .5, 1, 2, 4, 7, 11, 16, 25])
CLOCK = 4 * (HALF_HOURS // 2 + 1)       # half hours apart, by kind of day
AGES, DISTANCES, GAPS = len(RECENCY) + 1, len(KM) + 2, len(GAP) + 1     # one more distance: where there is no place
VISITS, SHARES, VISIBLE = 10, 16, 12
COMMON, TODAY = 8, 6    # places that two trajectories share; visits to a place in the current trajectory: at most 5
KEY = 32            # width of a head's queries and keys
POOL = 16           # of the layer behind the sums by place
BIASES = ("clock", "recency", "distance", "context", "trajectory")        # groups of them, which can be left out
LEAST = 1e-30       # what a place that was not visited has, for its logarithm


@dataclasses.dataclass(frozen=True)
class PointerConfig:
    """What must be known to build a pointer; `ga_llm.json` of a checkpoint holds it."""
    hidden_size: int
    heads: int = 8
    clock: bool = True          # BIASES: without one of these, those that it stands for are left out
    recency: bool = True
    distance: bool = True
    context: bool = True
    trajectory: bool = True

    def __post_init__(self):
        for name, kind in self.__annotations__.items():
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} {getattr(self, name)!r} is no {kind.__name__}")
        if not (self.hidden_size >= 1 and 1 <= self.heads <= 64):
            raise ValueError(f"hidden_size {self.hidden_size} or heads {self.heads} (1 to 64) is impossible")


class Pointed(NamedTuple):      # a tuple, in which DeepSpeed finds the tensors
    """What the pointer says. log_gate: (P, Q), of g; share: (P, Q, T), (1 - g) · P_pointer of each check-in's place,
    at the last visit to it, elsewhere 0."""
    log_gate: torch.Tensor
    share: torch.Tensor

    def of_targets(self, place: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(P, Q): the shares of the places `targets` (P, Q); place: (P, T), of the check-ins."""
        return (self.share * (place[:, None] == targets[..., None])).sum(-1)


class Pointer(nn.Module):
    """P prompts, of each Q questions about T check-ins (`forward`).

    mapping: of the places. Their categories, (places,), are those of the training's check-ins, kept with the weights.
    """

    def __init__(self, config: PointerConfig, mapping: GPSMapping, dropout: float = 0.0):
        super().__init__()
        self.config, heads, width = config, config.heads, config.hidden_size
        self.ids, self.places = mapping.ids, len(mapping.ids)       # the latter as an index: no place
        self.dropout = Dropout(dropout)
        for name, degrees in (("latitude", mapping.latitude), ("longitude", mapping.longitude)):
            self.register_buffer(name, torch.from_numpy(np.append(degrees, 0.)).float(), persistent=False)
        self.register_buffer("categories", torch.zeros(self.places, dtype=torch.long))
        self.query = nn.Linear(width, heads * KEY)
        self.key = nn.Linear(width, heads * KEY, bias=False)
        self.gates, self.visible = nn.Linear(width, heads + 1), _table(VISIBLE, heads + 1)
        # Biases of the heads for a pair: the moment that is asked about, and an earlier check-in. None: left out.
        self.clock, self.recency = self._of("clock", CLOCK, heads), self._of("recency", AGES, heads)
        self.distance, self.context = (self._of("distance", DISTANCES * GAPS, heads) for _ in range(2))
        self.same_before, self.same_category = (self._of("context", 2, heads) for _ in range(2))
        self.leaving, self.company, self.common = (
            self._of("trajectory", rows, heads) for rows in (4 * GAPS, 2 * GAPS, COMMON))
        # Pooled by place: how far each head is trusted, and what the last visit to the place tells.
        self.trust = nn.Linear(width, heads)
        self.pool1, self.pool2 = nn.Linear(heads + 2, POOL), nn.Linear(POOL, 1, bias=False)
        self.last_clock, self.last_recency, self.last_distance = (
            self._of(group, rows, 1) for group, rows in (("clock", CLOCK), ("recency", 2 * AGES),
                                                         ("distance", DISTANCES * GAPS)))
        self.last_leaving, self.last_today = (self._of("trajectory", rows, 1) for rows in (4 * GAPS, TODAY * GAPS))
        self.last_count, self.last_share = _table(VISITS, 1), _table(SHARES, 1)
        for zero in (*self.trust.parameters(), *self.pool2.parameters()):
            nn.init.zeros_(zero)
        self._begin_different()

    def _of(self, group: str, rows: int, columns: int) -> nn.Parameter | None:
        return _table(rows, columns) if getattr(self.config, group) else None

    @torch.no_grad()
    def _begin_different(self) -> None:
        """How narrow each head is by the clock, how steep by recency; every fourth likes the same place before."""
        apart, age = torch.arange(CLOCK) % (HALF_HOURS // 2 + 1), torch.arange(AGES)
        for head in range(self.config.heads):
            if self.config.clock:
                self.clock[:, head] = -(apart / (3, math.inf, 1.5, 6)[head % 4]).clamp(max=4)
            if self.config.recency:
                self.recency[:, head] = -age / (24, 4, 12, 6)[head % 4]
            if self.config.context:
                self.same_before[1, head] = 2. * (head % 4 == 1)

    @property
    def biases(self) -> list[nn.Parameter]:
        """The tables, which are indexed and not multiplied: they learn faster than matrices and do not decay."""
        return list(self.parameters(recurse=False))

    def forward(self, asking: torch.Tensor, states: torch.Tensor, second: torch.Tensor, place: torch.Tensor,
                first: torch.Tensor, query: torch.Tensor) -> Pointed:
        """What is pointed to at the moment of check-in `query` (P, Q) of each prompt, by the check-ins before it.

        asking: (P, Q, hidden size), the LLM's states where the places are asked for; states: (P, T, hidden size), at
        the check-ins; second, place (`places`: none), first (P, T): when and where each was, and which check-in its
        trajectory begins with. Behind a prompt's check-ins anything may stand, in increasing time, of trajectories that
        begin there.
        """
        j = torch.arange(place.shape[1], device=place.device)
        before = F.pad(place, (1, 0), value=self.places)[:, :-1]            # of each check-in, the place before
        gap = torch.bucketize((second - F.pad(second, (1, 0))[:, :-1]).float(), GAP.to(place.device), right=True)
        gap[:, 0] = len(GAP)        # no check-in before: long ago

        def asked(values):      # (P, T) to (P, Q, 1)
            return values.gather(1, query)[..., None]

        earlier = j < query[..., None]                                      # (P, Q, T)
        clock = self._clock(asked(second), second[:, None])
        age = torch.bucketize((asked(second) - second[:, None]).float(), RECENCY.to(place.device))
        step, last = asked(gap), asked(before)
        distance = self._steps(last, place[:, None]) * GAPS + step          # from the last place to the candidate
        scores = self._scores(asking, states)
        if self.config.clock:
            scores = scores + F.embedding(clock, self.clock)
        if self.config.recency:
            scores = scores + F.embedding(age, self.recency)
        if self.config.distance:
            context = self._steps(last, before[:, None]) * GAPS + step      # between the places before
            scores = scores + F.embedding(distance, self.distance) + F.embedding(context, self.context)
        if self.config.context:
            kind = F.pad(self.categories, (0, 1), value=-1)
            scores = scores + F.embedding((last == before[:, None]).long(), self.same_before) + F.embedding(
                (kind[last] == kind[before][:, None]).long(), self.same_category)
        same = place[:, :, None] == place[:, None]                                  # (P, T, T)
        if self.config.trajectory:
            leaving, company, common, today = self._trajectories(place, first, query, gap, last, same)
            company, today = company * GAPS + step, today * GAPS + step
            for feature, biases in ((leaving, self.leaving), (company, self.company), (common, self.common)):
                scores = scores + F.embedding(feature, biases)
        weights = scores.masked_fill(~earlier[..., None], -1e4).softmax(2)          # (P, Q, T, heads)

        # Without an earlier check-in all is the LLM's.
        any_earlier = (query > 0)[..., None]
        closed = F.pad(~any_earlier.expand(-1, -1, self.config.heads), (1, 0), value=False)
        gates = self.gates(self.dropout(asking)).float() + F.embedding(
            (query + 1).float().log2().long().clamp(max=VISIBLE - 1), self.visible)
        gates = gates.masked_fill(closed, -1e4).log_softmax(-1)
        of_head = (gates[..., 1:] - gates[..., 1:].logsumexp(-1, keepdim=True)).exp()

        # A place is represented by its last visit, at which its other visits' weights are added up.
        mass = (weights.permute(0, 3, 1, 2) @ same[:, None].to(weights.dtype)).permute(0, 2, 3, 1).float()
        visit = (same & (j < j[:, None])).sum(-1)                                   # how many visits stand before
        next_visit = torch.where(same & (j > j[:, None]), j, len(j) + 1).amin(-1)
        is_last = earlier & (next_visit[:, None] >= query[..., None])
        total = (mass * of_head[:, :, None]).sum(-1)
        logs = (mass + 1e-4).log() / 4 + 1
        visits = (visit + 1).float()
        inputs = torch.cat([logs, (total[..., None] + 1e-4).log() / 4 + 1,
                            visits.log1p()[:, None, :, None].expand(*total.shape, 1) / 2], -1)
        score = (total + 1e-7).log() + (logs * self.trust(self.dropout(asking)).float()[:, :, None]).sum(-1)
        score = score + self.pool2(F.gelu(self.pool1(inputs)))[..., 0].float()
        score = score + F.embedding(visits.log2().long().clamp(max=VISITS - 1), self.last_count)[:, None, :, 0]
        share = ((query[..., None].clamp(min=1).float().log2() - visits.log2()[:, None]) * 2).long()
        score = score + F.embedding(share.clamp(0, SHARES - 1), self.last_share)[..., 0]
        if self.config.clock:
            score = score + F.embedding(clock, self.last_clock)[..., 0]
        if self.config.recency:
            in_current = (j >= asked(first)).long()
            score = score + F.embedding(age * 2 + in_current, self.last_recency)[..., 0]
        if self.config.distance:
            score = score + F.embedding(distance, self.last_distance)[..., 0]
        if self.config.trajectory:
            score = score + (F.embedding(leaving, self.last_leaving) + F.embedding(today, self.last_today))[..., 0]
        pointed = score.masked_fill(~is_last, -1e4).softmax(-1) * is_last
        return Pointed(gates[..., 0], pointed * (1 - gates[..., :1].exp()) * any_earlier)

    def _scores(self, asking, states):
        """(P, Q, T, heads): products of queries and keys."""
        heads = self.config.heads
        query, key = (layer(self.dropout(x)).unflatten(-1, (heads, KEY))
                      for layer, x in ((self.query, asking), (self.key, states)))
        return torch.einsum("pqhc,pthc->pqth", query, key).float() / math.sqrt(KEY)

    @staticmethod
    def _trajectories(place, first, query, gap, last, same):
        """Of each question's trajectory and each check-in's, (P, Q, T) each:

        leaving: how long after the check-in the next one was, by whether the check-in ended its trajectory, and whether
        what is asked for does: what a test asks for always does, of the rest of a training's prompts one in eight.
        company: whether the check-in's trajectory had been at the question's last place; common: at how many places of
        the question's trajectory, COMMON - 1: this has none yet; today: how often the question's trajectory has been at
        the check-in's place.
        """
        j = torch.arange(place.shape[1], device=place.device)
        ends = (F.pad(first, (0, 1), value=-1)[:, 1:] != first).long()
        leaving = (ends * GAPS + F.pad(gap, (0, 1))[:, 1:])[:, None] + 2 * GAPS * ends.gather(1, query)[..., None]
        # Which check-ins stand before each one in its trajectory; and of these the first visits to each place.
        before = (first[:, :, None] == first[:, None]) & (j < j[:, None])
        places = before & ~(same & before).any(-1)[:, None]
        of_query = query[..., None].expand(-1, -1, len(j))
        at_last = (last == place[:, None]).float() @ before.float().transpose(1, 2)
        common = places.gather(1, of_query).float() @ same.float() @ places.float().transpose(1, 2)
        today = before.gather(1, of_query).float() @ same.float()
        none = query[..., None] == first.gather(1, query)[..., None]
        common = common.long().clamp(max=COMMON - 2).masked_fill(none, COMMON - 1)
        return leaving, (at_last > 0).long(), common, today.long().clamp(max=TODAY - 1)

    @staticmethod
    def _clock(one, other):
        """Half hours between two times of day, by kind: the same day of the week, both workdays or both of the weekend,
        a weekend's that asks for a workday's, or the other way round."""
        (half, day), (other_half, other_day) = (
            (second % DAY // 1800, (second // DAY + MONDAY) % 7) for second in (one, other))
        apart = (half - other_half).abs()
        apart = torch.minimum(apart, HALF_HOURS - apart)
        weekend, other_weekend = day >= 5, other_day >= 5
        kind = torch.where(weekend == other_weekend, (day != other_day).long(), 3 - weekend.long())
        return apart + (HALF_HOURS // 2 + 1) * kind

    def _steps(self, one, other):
        """Steps of distance between two places: 0 is the same, the last stands for where one of them is none."""
        latitude = self.latitude[one], self.latitude[other]
        east = (self.longitude[one] - self.longitude[other] + 180) % 360 - 180
        middle = torch.deg2rad((latitude[0] + latitude[1]) / 2).cos()
        km = torch.hypot((latitude[0] - latitude[1]) * 111.2, east * 111.3 * middle)
        steps = torch.bucketize(km, KM.to(km.device), right=True)
        return steps.masked_fill((one == self.places) | (other == self.places), DISTANCES - 1)


def _table(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns))
