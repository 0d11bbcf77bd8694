"""The city: categories and their hours, places around centres, and which place is near another, open, and popular."""
import dataclasses
import datetime

import numpy as np
from sklearn.neighbors import KDTree

from ga_llm.base import globe

KM_PER_DEGREE = 111.32  # of latitude


@dataclasses.dataclass(frozen=True)
class Category:
    """What a place is. `opens` and `closes` are local hours; past midnight counts on from 24."""
    name: str
    kind: str
    share: float  # of all places
    opens: float = 0
    closes: float = 24


CATEGORIES = (
    Category("Home (private)", "home", .25),
    Category("Office", "work", .09, 6, 22),
    Category("University", "work", .03, 6, 22),
    Category("Train Station", "station", .05, 5, 25),
    Category("Subway", "station", .03, 5, 25),
    Category("Ramen / Noodle House", "food", .07, 11, 23),
    Category("Sushi Restaurant", "food", .05, 11, 22),
    Category("Diner", "food", .05, 10, 24),
    Category("Caf\u00e9", "coffee", .05, 6.5, 20),  # not ASCII, as in the real files
    Category("Coffee Shop", "coffee", .05, 6, 21),
    Category("Food & Drink Shop", "shop", .05, 7, 24),
    Category("Mall", "shop", .04, 10, 21),
    Category("Bookstore", "shop", .03, 10, 21),
    Category("Gym / Fitness Center", "hobby", .05, 6, 23),
    Category("Bar", "hobby", .04, 17, 26),
    Category("Movie Theater", "hobby", .02, 10, 25),
    Category("Park", "outing", .03, 5, 22),
    Category("Museum", "outing", .02, 10, 18),
)
EXPLORABLE = ("food", "coffee", "shop", "hobby", "outing")


@dataclasses.dataclass(frozen=True)
class Format:
    """Where and when the city is. `centres` gives latitude, longitude and share of the people."""
    start: datetime.date
    utc_offset: int  # minutes
    centres: tuple[tuple[float, float, float], ...]


FORMATS = {
    "tky": Format(datetime.date(2012, 4, 3), 540, ((35.68, 139.76, 1.),)),
    "nyc": Format(datetime.date(2012, 4, 3), -240, ((40.74, -73.98, 1.),)),
    # Los Angeles, San Francisco, Las Vegas; and Phoenix, which lies in neither California nor Nevada.
    "ca": Format(datetime.date(2010, 4, 5), -420,
                 ((34.05, -118.24, .4), (37.77, -122.42, .3), (36.17, -115.14, .15), (33.45, -112.07, .15))),
}


class City:
    """Places, with positions in km on a plane; several centres lie far apart on it."""

    APART = 10_000.

    def __init__(self, form: Format, pois: int, seed: int):
        draw = np.random.default_rng([seed, 0])
        self.form = form
        shares = np.array([category.share for category in CATEGORIES])
        counts = np.maximum(1, np.floor(shares * pois)).astype(int)
        counts[0] += pois - counts.sum()  # what rounding leaves
        self.category = draw.permutation(np.repeat(np.arange(len(CATEGORIES)), counts))
        self.popularity = draw.pareto(1.1, pois) + 1
        self.centre = draw.choice(len(form.centres), pois, p=[share for _, _, share in form.centres])
        self.xy = self._positions(draw)
        self.latitude, self.longitude = self._degrees()
        self.ids = draw.bytes(12 * pois).hex()
        opens = np.array([category.opens for category in CATEGORIES]) * 60
        closes = np.array([category.closes for category in CATEGORIES]) * 60
        self.opens, self.closes = opens[self.category], closes[self.category]
        kinds = np.array([category.kind for category in CATEGORIES])[self.category]
        self.places = {kind: np.flatnonzero(kinds == kind) for kind in np.unique(kinds)}
        self.places["explorable"] = np.flatnonzero(np.isin(kinds, EXPLORABLE))
        self.trees = {kind: KDTree(self.xy[places]) for kind, places in self.places.items()}

    def _positions(self, draw) -> np.ndarray:
        """Homes spread over the city, everything else crowds in districts, the first of them the largest."""
        count = len(self.category)
        radius = 5 * (count / 400) ** .25  # km; a larger city is also denser
        districts = int(np.sqrt(count) / 2) + 1
        middle = draw.normal(0, radius / 2, (districts, 2))
        weight = 1 / (1 + np.arange(districts))
        crowded = middle[draw.choice(districts, count, p=weight / weight.sum())] + draw.normal(0, .5, (count, 2))
        spread = draw.normal(0, radius / 1.5, (count, 2))
        xy = np.where((self.category == 0)[:, None], spread, crowded)
        xy[:, 0] += self.APART * self.centre
        return xy

    def _degrees(self) -> tuple[np.ndarray, np.ndarray]:
        centres = np.array(self.form.centres)[self.centre]
        latitude = centres[:, 0] + self.xy[:, 1] / KM_PER_DEGREE
        assert np.abs(latitude).max(initial=0) < globe.POLAR, "no plane city lies at a pole; move its centre"
        east = self.xy[:, 0] - self.APART * self.centre
        longitude = centres[:, 1] + east / (KM_PER_DEGREE * np.cos(np.radians(centres[:, 0])))
        return np.round(latitude, 6), np.round(globe.wrapped(longitude), 6)

    def is_open(self, poi: np.ndarray, minute: np.ndarray) -> np.ndarray:
        """Whether places are open at a local minute of the day; hours past midnight wrap around."""
        minute = minute % 1440
        opens, closes = self.opens[poi], self.closes[poi]
        return ((opens <= minute) & (minute < closes)) | (minute + 1440 < closes)

    def near(self, draw, kind: str, anchor: np.ndarray, hop_km: float, minute: np.ndarray) -> np.ndarray:
        """For each anchor place a place of `kind`: a hop of random length and direction, then by popularity.

        Returns place indices, -1 where nothing around is open at `minute`.
        """
        count = len(anchor)
        length, angle = draw.exponential(hop_km, count), draw.uniform(0, 2 * np.pi, count)
        landing = self.xy[anchor] + length[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
        places = self.places[kind]
        distance, found = self.trees[kind].query(landing, k=min(12, len(places)))
        candidates = places[found]
        # Gumbel's trick: the largest of log-weight + Gumbel noise is a draw by weight. Half a km counts as one e-fold.
        score = np.log(self.popularity[candidates]) - distance / .5 + draw.gumbel(size=candidates.shape)
        allowed = self.is_open(candidates, minute[:, None]) & (distance < self.APART / 2)
        score[~allowed | (candidates == anchor[:, None])] = -np.inf
        best = score.argmax(axis=1)
        rows = np.arange(count)
        return np.where(np.isfinite(score[rows, best]), candidates[rows, best], -1)
