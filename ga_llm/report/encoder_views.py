"""What the geo-encoder's vectors know of distance: their principal components on the map, their distances beside km."""
import dataclasses
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA

from ga_llm.evaluation import metrics
from ga_llm.report.contents import SEED, Absent, Evaluation
from geo_encoder import injection
from geo_encoder.encoder import GeoEncoderConfig, build_encoder
from geo_encoder.gps_tokens import GPSMapping
from geo_encoder.weights import digest, load_encoder

log = logging.getLogger(__name__)

PAIRS = 20_000      # of places, whose embedding distance is compared with their distance
MOST_PLACES = 5_000     # that are embedded: at width 4,096 that is 1e14 operations, for two encoders


@dataclasses.dataclass
class Embeddings:
    """An encoder's vectors. colours: (places, 3), the first principal components, each from 0 to 1.

    explained: the components' share of the variance. km, distance: (pairs of places,), on the ground and between the
    vectors (Euclidean); pearson, spearman: their correlations.
    """
    colours: np.ndarray
    explained: float
    km: np.ndarray
    distance: np.ndarray
    pearson: float
    spearman: float


@dataclasses.dataclass
class EncoderViews:
    """An encoder's vectors of `mapping`'s places, before and after training."""
    path: Path
    config: GeoEncoderConfig
    digest: str
    mapping: GPSMapping
    places: int     # of the whole mapping
    before: Embeddings
    after: Embeddings


def read_encoder(evaluation: Evaluation, mapping: GPSMapping, given: Path | str | None = None) -> EncoderViews:
    """The encoder that is given or of the test, beside one of the same configuration that has learned nothing.

    Raises Absent if the test had none or its file is gone.
    """
    path = given or evaluation.settings.get("geoencoder_path", "None")
    if not given and (path in ("", "None") or evaluation.settings.get("test_type") == "base"
                      or evaluation.settings.get("use_random_projector") == "True"):
        raise Absent("the test had no geo-encoder with files of its own; give --geoencoder_path")
    if not given and not Path(path).is_file():
        raise Absent(f"the geo-encoder is not at {path}; give --geoencoder_path")
    if len(mapping.ids) < 4:
        raise Absent(f"the GPS mapping has {len(mapping.ids)} places, too few for a map")
    encoder, config = load_encoder(path)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        untrained = build_encoder(config)
    shown, name = some_places(mapping), digest(encoder.state_dict())
    before, after = (embeddings(vectors(one, config, shown), shown) for one in (untrained, encoder))
    return EncoderViews(Path(path), config, name, shown, len(mapping.ids), before, after)


def some_places(mapping: GPSMapping) -> GPSMapping:
    """At most MOST_PLACES of the mapping's, drawn with a fixed seed."""
    if len(mapping.ids) <= MOST_PLACES:
        return mapping
    rows = np.sort(np.random.default_rng(SEED).choice(len(mapping.ids), MOST_PLACES, replace=False))
    return GPSMapping(mapping.ids[rows], mapping.latitude[rows], mapping.longitude[rows])


def vectors(encoder: torch.nn.Module, config: GeoEncoderConfig, mapping: GPSMapping) -> np.ndarray:
    """(places, hidden size), as they stand for `<GPS n>` in the LLM."""
    if config.hidden_size >= 1024 and not torch.cuda.is_available():
        log.info("embedding %d places at width %d on a CPU takes a while", len(mapping.ids), config.hidden_size)
    found = injection.gps_injection(encoder, config.level, mapping, np.arange(len(mapping.ids)))
    found.to("cuda" if torch.cuda.is_available() else "cpu").freeze(torch.float32)
    return found.table.cpu().numpy()


def embeddings(table: np.ndarray, mapping: GPSMapping) -> Embeddings:
    """table: (places, width), the vectors of `mapping`'s places."""
    components = min(3, *table.shape)
    pca = PCA(components, svd_solver="randomized", random_state=SEED)
    scores = pca.fit_transform(table.astype(np.float64))
    low, high = np.percentile(scores, [2, 98], axis=0)
    colours = np.full((len(table), 3), 0.5)
    colours[:, :components] = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    one, other = place_pairs(len(table))
    km = metrics.distances(mapping.ids[one], mapping.ids[other], mapping)
    # Block by block: all pairs at once would be a gigabyte at Llama's width.
    distance = np.concatenate([np.linalg.norm(table[a] - table[b], axis=1)
                               for a, b in zip(*(np.array_split(rows, 1 + len(one) // 1000) for rows in (one, other)))])
    return Embeddings(colours, float(pca.explained_variance_ratio_.sum()), km, distance, correlation(km, distance),
                      correlation(*(pd.Series(values).rank().to_numpy() for values in (km, distance))))


def place_pairs(places: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two different places each: all pairs, or PAIRS of them, drawn with a fixed seed."""
    if places * (places - 1) // 2 <= PAIRS:
        return np.triu_indices(places, k=1)
    random = np.random.default_rng(SEED)
    one = random.integers(0, places, PAIRS)
    return one, (one + random.integers(1, places, PAIRS)) % places


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; nan where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else float("nan")
