"""`<GPS n>` and `<POI n>`: one token per place of the mapping, found by id, the same in training and in evaluation."""
import dataclasses
import gzip
import hashlib
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import AddedToken

from ga_llm.base.artifacts import GPS_COLUMNS, require
from ga_llm.base.cli import UserError
from ga_llm.base.prompts import GPS_TOKEN, MOMENTS, POI_TOKEN, TIME_TOKEN, gps_token, poi_token, time_token
from ga_llm.base.sharding import gathered

MADE_BY = "python data-preprocess/run.py -f best_conf/<name>.yml"
HIGHEST_ID = 2**53      # beyond, a floating-point number need not be the one that was written


@dataclasses.dataclass
class GPSMapping:
    """The places of a data set: ids (N,) int64, coordinates (N,) degrees. Row order carries no meaning."""
    ids: np.ndarray
    latitude: np.ndarray
    longitude: np.ndarray

    @property
    def digest(self) -> str:
        """What tells these places from others: ids and coordinates, whatever their order."""
        table = np.stack([self.ids.astype(np.float64), self.latitude, self.longitude])
        return hashlib.sha256(np.ascontiguousarray(table[:, self.ids.argsort()]).tobytes()).hexdigest()[:16]

    @property
    def tokens(self) -> list[str]:
        return [gps_token(gps_id) for gps_id in self.ids]

    @property
    def poi_tokens(self) -> list[str]:
        return [poi_token(gps_id) for gps_id in self.ids]


def read_gps_mapping(path: Path | str) -> GPSMapping:
    """Read `<ds>_gps_mapping.csv`. Raises UserError naming the line that is wrong.

    Departure from the released code: it looks a place up by its position in this file, which is its id only where
    ids start at 0 and no row is missing.
    """
    path = require(path, MADE_BY)
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            table = pd.read_csv(path, compression="gzip" if path.suffix == ".gz" else None, index_col=False,
                                skip_blank_lines=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error
            ) as error:
        raise UserError(f"{path}: not a CSV file ({' '.join(str(error).split())}); make it again with `{MADE_BY}`"
                        ) from None
    except pd.errors.ParserWarning:     # cells would be lost
        raise UserError(f"{path}: rows have more cells than the header, as where a comma stands for the decimal point; "
                        f"correct it or make it again with `{MADE_BY}`") from None
    table = table.dropna(how="all")                     # blank lines, which the line numbers count
    missing = [column for column in GPS_COLUMNS if column not in table]
    if missing or table.empty:
        what = f"no column {missing[0]}" if missing else "no rows"
        raise UserError(f"{path}: {what}; expected {','.join(GPS_COLUMNS)}, make it with `{MADE_BY}`")

    try:
        values = table[GPS_COLUMNS].apply(pd.to_numeric, errors="coerce")
    except OverflowError:
        raise UserError(f"{path}: a number has hundreds of digits; correct it or make it again with `{MADE_BY}`"
                        ) from None
    ids = values["GPS_id"]
    whole = (ids >= 0) & (ids < HIGHEST_ID) & (ids % 1 == 0)
    for wrong, what in ((~whole, "GPS_id is not a whole number from 0 to 2^53"),
                        (ids.duplicated(), "GPS_id stands twice"),
                        (~values["Latitude"].between(-90, 90), "Latitude is not within -90..90 degrees"),
                        (~values["Longitude"].between(-180, 180), "Longitude is not within -180..180 degrees")):
        if wrong.any():
            row = int(table.index[wrong][0])
            raise UserError(f"{path}, line {row + 2}: {what}; correct it or make it again with `{MADE_BY}`")
    return GPSMapping(ids.to_numpy(np.int64), values["Latitude"].to_numpy(), values["Longitude"].to_numpy())


def add_gps_tokens(tokenizer, mapping: GPSMapping, model=None) -> np.ndarray:
    """Add one `<GPS n>` per place to the tokenizer, and a row to the model's embeddings, unless they are there.

    Returns the tokens' ids, (N,), in the mapping's order. Raises UserError if the tokenizer has been trained with
    other places: their tokens would pass for text that has a place.
    """
    return _add(tokenizer, mapping.tokens, GPS_TOKEN, model)


def places_of_tokens(token_ids: np.ndarray, highest: int) -> np.ndarray:
    """(tokens,) of every token id up to `highest`, and those of the places: its place's row of the mapping, else -1.

    token_ids: (places,), the `<GPS n>` of each place.
    """
    rows = np.full(max(int(token_ids.max()), highest) + 1, -1)
    rows[token_ids] = np.arange(len(token_ids))
    return rows


def add_poi_tokens(tokenizer, mapping: GPSMapping, model=None) -> np.ndarray:
    """The same with `<POI n>`, behind those of the places."""
    return _add(tokenizer, mapping.poi_tokens, POI_TOKEN, model)


def add_time_tokens(tokenizer, model=None) -> np.ndarray:
    """The same with `<TIME n>`, (`MOMENTS`,), behind those of the places."""
    return _add(tokenizer, [time_token(moment) for moment in range(MOMENTS)], TIME_TOKEN, model)


def _add(tokenizer, tokens: list[str], kind: re.Pattern, model) -> np.ndarray:
    known = len(tokenizer)
    foreign = [token for token in tokenizer.get_added_vocab() if kind.fullmatch(token)]
    foreign = sorted(set(foreign).difference(tokens))
    if foreign:
        raise UserError(f"the tokenizer already has {foreign[0]}, which has no row in the GPS mapping; give the "
                        "mapping that the model was trained with, or another model")
    # transformers' own list of extra special tokens is searched from its start for every token, at each load, too.
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in tokens], special_tokens=True)
    token_ids = np.asarray(tokenizer.convert_tokens_to_ids(tokens))
    if model is not None:
        add_rows(model, len(tokenizer), token_ids[token_ids >= known])
    return token_ids


@torch.no_grad()
def add_rows(model, vocabulary: int, new: np.ndarray) -> None:
    """Grow the model's embeddings to `vocabulary` rows; the rows of the `new` tokens start at the mean of those before.

    transformers' own mean resizing draws from a normal distribution fitted to the rows: at random, and its covariance
    costs minutes at Llama's width.
    """
    if vocabulary > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        with gathered([layer.weight], write=True):
            weight = layer.weight
            if len(new) and len(weight):     # ZeRO-3 shows the whole parameter to rank 0 alone
                weight[torch.from_numpy(new)] = weight[:new.min()].mean(dim=0, dtype=torch.float32).to(weight.dtype)


def keep_rows(weight: torch.nn.Parameter, token_ids: np.ndarray) -> None:
    """Let no gradient reach the rows of `token_ids`: where embeddings are tied, the loss would move them.

    Call it when it is settled whether `weight` is trained at all.
    """
    if not weight.requires_grad:
        return
    rows = torch.from_numpy(token_ids)
    weight.register_hook(lambda grad: grad.index_fill(0, rows.to(grad.device), 0))
