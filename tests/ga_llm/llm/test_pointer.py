"""The pointer against loops over visits and places, and what it must not see."""
import datetime
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ga_llm.llm import pointer
from ga_llm.llm.pointer import Pointer, PointerConfig
from geo_encoder.gps_tokens import GPSMapping

PLACES, WIDTH, HEADS = 9, 16, 4
HOURS = [.25, .5, 1, 2, 4, 8, 14, 22, 26, 36, 48, 72, 120, 168, 240, 336, 504, 720, 1080, 1440, 2160, 2880, 4320]
MINUTES = [5, 30, 120, 480, 1440, 5760, 20160]
KM = [.001, .1, .25, .5, 1, 2, 4, 7, 11, 16, 25]


@pytest.fixture
def city():
    draw = np.random.default_rng(3)
    return GPSMapping(np.arange(PLACES) + 1, 40 + draw.normal(0, .05, PLACES), -74 + draw.normal(0, .05, PLACES))


def made(city, **options):
    """A pointer in which nothing is zero, so that every part shows."""
    torch.manual_seed(1)
    found = Pointer(PointerConfig(WIDTH, HEADS, **options), city).eval()
    found.categories.copy_(torch.arange(len(city.ids)) % 3)
    for parameter in found.parameters():
        parameter.data += .5 * torch.randn(parameter.shape)
    return found


def inputs(prompts=3, visits=12, seed=0):
    """asking, states, second, place, first, query: of every check-in."""
    draw = np.random.default_rng(seed)
    second = 1333476009 + np.cumsum(draw.exponential(30000, (prompts, visits)).astype(np.int64), axis=1)
    place = draw.integers(0, PLACES, (prompts, visits))
    first = np.maximum.accumulate(np.where(draw.random((prompts, visits)) < .4, np.arange(visits), 0), axis=1)
    asking, states = torch.randn(2, prompts, visits, WIDTH, generator=torch.Generator().manual_seed(seed))
    query = torch.arange(visits).expand(prompts, -1).clone()
    return [asking, states, *(torch.from_numpy(part) for part in (second, place, first)), query]


def steps(value, edges, reaches):
    return sum(value >= edge if reaches else value > edge for edge in edges)


def loops(city, model, asking, states, second, place, first, query):
    """{place: probability} that the pointer gives at check-in `query` of one prompt, and log g; in plain Python."""
    def table(rows, index):
        return rows.detach()[index]

    def km(one, other):
        north, east = (city.latitude[one] - city.latitude[other]) * 111.2, city.longitude[one] - city.longitude[other]
        middle = math.cos(math.radians((city.latitude[one] + city.latitude[other]) / 2))
        return math.hypot(north, east * 111.3 * middle)

    def distance(one, other):
        return 12 if one is None or other is None else steps(km(one, other), KM, True)

    def before(i):
        return place[i - 1] if i else None

    def moment(i):
        at = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=second[i])
        return at.weekday(), at.hour * 2 + at.minute // 30

    def clock(j):
        (day, half), (other_day, other_half) = moment(query), moment(j)
        apart = min(abs(half - other_half), 48 - abs(half - other_half))
        kind = (0 if day == other_day else 1) if (day >= 5) == (other_day >= 5) else 2 if day >= 5 else 3
        return 25 * kind + apart

    def gap_before(i):
        return 7 if i == 0 else steps((second[i] - second[i - 1]) / 60, MINUTES, True)

    def before_in_trajectory(i):
        return place[first[i]:i]

    def leaving(j):
        return 16 * ends(query) + 8 * ends(j) + gap_before(j + 1)

    def ends(j):        # its trajectory
        return j + 1 == len(first) or first[j + 1] != first[j]

    def company(j):
        return 8 * (before(query) in before_in_trajectory(j)) + gap

    def common(j):
        own = set(before_in_trajectory(query))
        return min(len(own & set(before_in_trajectory(j))), 6) if own else 7

    gap = gap_before(query)
    gates = model.gates(asking) + table(model.visible, min(int(math.log2(query + 1)), 11))
    if query == 0:
        return {}, 0.0
    gates = gates.log_softmax(-1)
    of_head = gates[1:].softmax(-1)
    age = [steps((second[query] - second[j]) / 3600, HOURS, False) for j in range(query)]
    scores = []
    for j in range(query):
        keys = (model.query(asking).view(HEADS, 32) * model.key(states[j]).view(HEADS, 32)).sum(-1) / math.sqrt(32)
        same_kind = (before(query) is None) == (before(j) is None) and (
            before(query) is None or before(query) % 3 == before(j) % 3)
        scores.append(keys + table(model.clock, clock(j)) + table(model.recency, age[j])
                      + table(model.distance, distance(before(query), place[j]) * 8 + gap)
                      + table(model.context, distance(before(query), before(j)) * 8 + gap)
                      + table(model.same_before, int(before(query) == before(j)))
                      + table(model.same_category, int(same_kind)) + table(model.leaving, leaving(j))
                      + table(model.company, company(j)) + table(model.common, common(j)))
    weights = torch.stack(scores).softmax(0)
    score = {}
    for c in set(place[:query]):
        visits = [j for j in range(query) if place[j] == c]
        last = visits[-1]
        mass = weights[visits].sum(0)
        total, logs = (mass * of_head).sum(), (mass + 1e-4).log() / 4 + 1
        hidden = torch.cat([logs, torch.stack([(total + 1e-4).log() / 4 + 1,
                                               torch.tensor(math.log1p(len(visits)) / 2)])])
        share = int(min(max(2 * (math.log2(query) - math.log2(len(visits))), 0), 15))
        score[c] = ((total + 1e-7).log() + (logs * model.trust(asking)).sum()
                    + model.pool2(F.gelu(model.pool1(hidden)))[0]
                    + table(model.last_count, min(int(math.log2(len(visits))), 9))[0]
                    + table(model.last_share, share)[0]
                    + table(model.last_clock, clock(last))[0]
                    + table(model.last_recency, age[last] * 2 + (last >= first[query]))[0]
                    + table(model.last_distance, distance(before(query), c) * 8 + gap)[0]
                    + table(model.last_leaving, leaving(last))[0]
                    + table(model.last_today, min(before_in_trajectory(query).count(c), 5) * 8 + gap)[0])
    whole = torch.stack(list(score.values())).softmax(0) * (1 - gates[0].exp())
    return {c: float(p) for c, p in zip(score, whole)}, float(gates[0])


@torch.no_grad()
def test_it_is_what_plain_loops_give(city):
    model, given = made(city), inputs()
    found = model(*given)
    asking, states, second, place, first, query = given
    for p in range(len(place)):
        for i in range(place.shape[1]):
            expected, gate = loops(city, model, asking[p, i], states[p], *(x[p].tolist() for x in (
                second, place, first)), i)
            assert found.log_gate[p, i].item() == pytest.approx(gate, abs=1e-5)
            shares = torch.stack([found.of_targets(place, torch.full_like(query, c))[p, i] for c in range(PLACES)])
            assert shares.tolist() == pytest.approx([expected.get(c, 0.0) for c in range(PLACES)], abs=1e-5)
            assert found.log_gate[p, i].exp() + shares.sum() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_a_few_questions_are_answered_like_all(city):
    model, given = made(city), inputs()
    whole, some = model(*given), torch.tensor([[11, 3], [0, 5], [7, 7]])
    asking = given[0].gather(1, some[..., None].expand(-1, -1, WIDTH))
    found = model(asking, *given[1:5], some)
    assert torch.allclose(found.log_gate, whole.log_gate.gather(1, some), atol=1e-6)
    assert torch.allclose(found.share, whole.share.gather(1, some[..., None].expand(-1, -1, 12)), atol=1e-6)


@torch.no_grad()
def test_nothing_of_the_target_or_later_is_seen(city):
    """But for one thing: whether the target ends its trajectory, which what is asked in a test always does."""
    model, given = made(city), inputs()
    given[4][:, 7] = 7
    found = model(*given)
    for changed in (1, 2, 3, 4):        # states, times, places, trajectories from check-in 6 on
        other = [part.clone() for part in given]
        if changed == 1:
            other[1][:, 6:] = 9.
        elif changed == 2:      # that of check-in 6 is asked about
            other[2][:, 7:] += 10 ** 6
        elif changed == 3:
            other[3][:, 6:] = (other[3][:, 6:] + 1) % PLACES
        else:
            other[4][:, 8:] = 7
        seen = model(*other)
        assert torch.equal(seen.log_gate[:, :7], found.log_gate[:, :7])
        assert torch.equal(seen.share[:, :7], found.share[:, :7])


@torch.no_grad()
@pytest.mark.parametrize("name", ["clock", "recency", "distance", "context", "trajectory"])
def test_what_is_left_out_has_no_part(city, name):
    of = {"clock": ("clock", "last_clock"), "recency": ("recency", "last_recency"),
          "distance": ("distance", "context", "last_distance"), "context": ("same_before", "same_category"),
          "trajectory": ("leaving", "company", "common", "last_leaving", "last_today")}[name]
    whole, without, given = made(city), made(city, **{name: False}), inputs()
    assert whole.state_dict().keys() - without.state_dict().keys() == set(of)
    without.load_state_dict({key: whole.state_dict()[key] for key in without.state_dict()})
    assert not torch.allclose(whole(*given).share, without(*given).share, atol=1e-3)
    for table in of:
        getattr(whole, table).data.zero_()
    assert torch.allclose(whole(*given).share, without(*given).share, atol=1e-6)


@pytest.mark.parametrize("without", [(), ("clock",), ("recency",), ("distance",), ("context",),
                                     ("trajectory",), pointer.BIASES])
def test_all_that_there_is_learns(city, without):
    """Several processes refuse a weight that the loss does not reach."""
    model = made(city, **{name: False for name in without})
    found = model(*inputs())
    (found.share.clamp(min=1e-6).log().sum() + found.log_gate.sum()).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@torch.no_grad()
def test_behind_a_prompts_check_ins_anything_may_stand(city):
    model, given = made(city), inputs()
    padded = [torch.cat([part, part[:, -1:].expand(-1, 3, *part.shape[2:])], 1) for part in given[1:5]]
    padded[2][:, 12:], padded[3][:, 12:] = PLACES, 12
    found = model(given[0], *padded, given[5])
    assert torch.allclose(found.share[..., :12], model(*given).share, atol=1e-6)
    assert (found.share[..., 12:] == 0).all()


def test_the_meridian_of_the_date_line_does_not_part_neighbours():
    model = made(GPSMapping(np.arange(2), np.array([10., 10.]), np.array([179.9995, -179.9995])))
    assert model._steps(torch.tensor([0]), torch.tensor([1])).item() == steps(.11, KM, True)


def test_a_description_that_is_none_is_refused():
    with pytest.raises(ValueError, match="heads"):
        PointerConfig(16, heads=0)
    with pytest.raises(ValueError, match="clock"):
        PointerConfig(16, clock=1)
    assert pointer.DISTANCES == len(KM) + 2 and pointer.AGES == len(HOURS) + 1 and pointer.GAPS == len(MINUTES) + 1
