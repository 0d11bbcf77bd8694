"""Samples → question-answer pairs (paper, Section 4), and the trajectories' texts for the search of similar ones.

One pair per trajectory of a split: its last remaining check-in is the target, the others are the current trajectory.
History and similar trajectories come from train alone, and only from before the current trajectory's first check-in.
Nothing is shown that happened in the target's second or later.
"""
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import pandas as pd
from tqdm import tqdm

from checkins import config as configs
from checkins import samples, shown
from checkins.config import Config
from checkins.wording import short
from ga_llm.base import artifacts, cli, json_text, prompts, writing

SPLITS = ("train", "test")
VALIDATE = "validate"       # asked like test, where somebody must choose
# A trajectory as text to search by: everything but the GPS tokens, which no text encoder knows.
KEY_FIELDS = tuple(field for field in prompts.FIELDS if field != "gps")
MISSING = 0.9       # of a history's trajectories at most, where it is thinned
ANSWERS = ("id", "token")
PAM = "pam"         # the stage whose questions ask what `<POI n>` is

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Row numbers of one pair: `similar` and `history` in train's sample, `current` and `target` in the split's."""

    trajectory: int
    similar: np.ndarray
    history: np.ndarray
    current: np.ndarray
    target: int


def pairs(config: Config, train: pd.DataFrame, split: pd.DataFrame,
          listed: dict[str, list[int]] | None = None) -> Iterator[Pair]:
    """The pairs of `split` (which may be `train` itself), by user, then trajectory.

    train, split: samples as `samples.load` gives them. listed: trajectory id, as text -> ids of similar train
    trajectories; None: no similar ones.
    """
    trajectories, rows_of = _grouped(split["TrajectoryId"])
    times = split["Time"].to_numpy()
    first_rows, targets = (np.array([rows[i] for rows in rows_of], dtype=int) for i in (0, -1))
    if split is train:
        train_rows_before = first_rows    # rows are in (time, raw-file order)
    else:
        train_rows_before = np.searchsorted(train["Time"], times[first_rows], side="right")
    # Departure from the released code: nothing of the target's own second, whatever its place in the file (`_current`).
    train_rows_before = np.minimum(train_rows_before, np.searchsorted(train["Time"], times[targets]))

    # Train's rows by (user, time): those of one user before row r are those whose key is in [user·n, user·n + r).
    n = len(train)
    by_user = np.argsort(train["UserId"].to_numpy(), kind="stable")
    keys = train["UserId"].to_numpy()[by_user] * n + by_user
    user = split["UserId"].to_numpy()[first_rows]
    starts, stops = np.searchsorted(keys, user * n), np.searchsorted(keys, user * n + train_rows_before)

    similar_to = _similar(train, listed, config.max_similar) if listed is not None else None
    none = np.empty(0, dtype=int)
    for trajectory, rows, start, stop in zip(trajectories.tolist(), rows_of, starts, stops):
        current, target = _current(rows, times), rows[-1]
        first = max(start, stop - config.max_history)
        if config.history_step:
            # A long history begins at a multiple of the step, so that several pairs in a row begin alike.
            first = min(stop, start + -(-(first - start) // config.history_step) * config.history_step)
        history = by_user[first:stop]
        if len(current) > config.max_current_with_history:
            history = none
        similar = none
        # Departure from the released code: there the first user with a long history ends this for all who follow.
        if similar_to and len(history) <= config.max_history_with_similar:
            similar = similar_to(trajectory, times[rows[0]])
        yield Pair(trajectory, similar, history, current[max(0, len(current) - config.max_current):], target)


def covering(pairs_: Iterable[Pair], train: pd.DataFrame) -> Iterator[Pair]:
    """Of train's pairs as few as show every check-in, in their order: the last of each user, and from there back the
    pair of the trajectory that holds the latest check-in not yet shown. For training on every check-in of a prompt.
    """
    pairs_ = list(pairs_)
    of_trajectory = {pair.trajectory: i for i, pair in enumerate(pairs_)}
    trajectory = train["TrajectoryId"].to_numpy()
    kept = set()
    for rows in train.groupby("UserId", sort=False).indices.values():
        while len(rows):
            i = of_trajectory[trajectory[rows[-1]]]
            kept.add(i)
            pair = pairs_[i]
            first = min((part[0] for part in (pair.history, pair.current) if len(part)), default=pair.target)
            rows = rows[rows < min(first, rows[-1])]
    yield from (pairs_[i] for i in sorted(kept))


def thinned(pairs_: Iterable[Pair], train: pd.DataFrame, copies: int, seed: int = 0, missing: float = MISSING
            ) -> Iterator[Pair]:
    """All of train's pairs `copies` times; each time trajectories are missing from their histories, at random.

    For each pair of each copy a share is drawn between 0 and `missing`, and each trajectory is missing with that
    probability. So a user's check-ins are seen with ever other pasts and, as in test, after weeks without any.
    """
    pairs_, draw = list(pairs_), np.random.default_rng(seed)
    trajectory = train["TrajectoryId"].to_numpy()
    for _ in range(copies):
        for pair in pairs_:
            shown = trajectory[pair.history]
            distinct, which = np.unique(shown, return_inverse=True)
            stays = draw.random(len(distinct)) >= draw.uniform(0, missing)
            yield dataclasses.replace(pair, history=pair.history[stays[which]])


def records(config: Config, stage: int | str, split: pd.DataFrame, split_texts: list[str], train: pd.DataFrame,
            train_texts: list[str], pairs_: Iterable[Pair], places: pd.DataFrame, fields: tuple[str, ...] = (),
            as_token: bool = False) -> Iterator[dict]:
    """Each pair as {"question", "answer"}. Stage 1 asks for the coordinates of the target's POI, stage 2 for its id,
    PAM for the id of its `<POI n>`, and with the field `gps` for the coordinates of its `<GPS n>`, too.

    split, train: samples, and the texts of their check-ins. places: the GPS mapping by id; its coordinates are stage
    1's answer, for they are what the encoder sees. as_token: the answer is `<GPS n>`, not `POI id n`.
    """
    time, user, poi = (split[column].tolist() for column in ("LocalTime", "UserId", "PoiId"))
    coordinates = dict(zip(places.index.tolist(), zip(places["Latitude"].tolist(), places["Longitude"].tolist())))
    first_id, last_id = min(coordinates), max(coordinates)
    seconds, train_seconds = (rows["Time"].to_numpy("datetime64[s]").astype(np.int64) for rows in (split, train))
    for pair in pairs_:
        t, moment = pair.target, ""
        similar, history = ([train_texts[row] for row in rows] for rows in (pair.similar, pair.history))
        current = [split_texts[row] for row in pair.current]
        if prompts.MOMENT in fields:    # a check-in then depends on the one before, and nothing stands between two
            similar, _ = prompts.in_tokens(similar, train_seconds[pair.similar].tolist())
            own, moment = prompts.in_tokens(history + current, np.concatenate([
                train_seconds[pair.history], seconds[pair.current]]).tolist(), int(seconds[t]))
            parts = similar, own[:len(history)], own[len(history):]
            similar, history, current = (["".join(part)] if part else [] for part in parts)
        if stage == 1:
            ask, answer = prompts.ask_coordinates(poi[t]), prompts.answer_coordinates(*coordinates[poi[t]])
        elif stage == PAM and "gps" in fields:
            ask = f"{prompts.ask_id(poi[t])} {prompts.ask_coordinates(poi[t])}"
            answer = prompts.answer_id_and_coordinates(poi[t], *coordinates[poi[t]])
        elif stage == PAM:
            ask, answer = prompts.ask_id(poi[t]), prompts.answer_id(poi[t])
        else:
            ask = prompts.ask_poi(time[t], user[t], first_id, last_id)
            answer = prompts.answer_poi(time[t], user[t], poi[t], moment, as_token)
        yield {"question": prompts.question(user[t], similar, history, current, ask), "answer": answer}


def texts(rows: pd.DataFrame, fields: Iterable[str]) -> list[str]:
    """The text of each check-in, in row order."""
    columns = ("LocalTime", "UserId", "PoiId", "Latitude", "Longitude", "PoiCategoryName", "PoiCategoryId")
    return [prompts.check_in(fields, *cells) for cells in zip(*(rows[column].tolist() for column in columns))]


def write(config: Config, stage: int, use_sim: bool, fields: tuple[str, ...], cover: bool = False, copies: int = 0,
          splits: tuple[str, ...] = SPLITS, missing: float = MISSING, as_token: bool = False) -> None:
    """Write the question files of one stage, one for each split, and beside each its settings, and stage 2's check-ins.

    cover: of train only `covering` pairs. copies: so many `thinned` ones of train's pairs instead of these; 0: none.
    as_token: answers are `<GPS n>`.
    """
    settings = {"dataset": config.dataset_name, "stage": stage, "fields": fields, "use_sim": use_sim,
                "max_history": config.max_history, "history_step": config.history_step}
    settings |= {"answer": ANSWERS[1]} if as_token else {}
    with writing.alone(config.folder), writing.together() as new_file:
        split_rows = {split: samples.load(config, split) for split in splits}
        places = samples.load_places(config)
        check_places(config, split_rows, places)
        listed = {split: load_similar(config, split, split_rows) if use_sim else None for split in splits}
        train_texts = texts(split_rows["train"], fields)
        for split, rows in split_rows.items():
            split_texts = train_texts if split == "train" else texts(rows, fields)
            found = pairs(config, split_rows["train"], rows, listed[split])
            count = rows["TrajectoryId"].nunique()
            if cover and split == "train":
                found = list(covering(found, rows))
                count = len(found)
            if copies and split == "train":
                found, count = thinned(found, rows, copies, missing=missing), count * copies
            check_ins = shown.CheckIns(split_rows["train"], rows)
            made = tqdm(records(config, stage, rows, split_texts, split_rows["train"], train_texts,
                                check_ins.noting(found), places, fields, as_token),
                        desc=split, total=count, unit="pair", disable=not cli.show_progress())
            path = config.folder / artifacts.questions(split, config.dataset_name, stage, use_sim,
                                                       prompts.ALIGNED in fields)
            with new_file(artifacts.question_settings(path), "wb") as file:
                file.write(json_text.dumps(settings) + b"\n")
            with new_file(path, "wb") as file:
                written = shown.Hashed(file)
                count = write_json_array(written, made) if split == "train" else _write_lines(written, made)
            if stage == 2 and "gps" in fields:
                with new_file(artifacts.check_ins(path), "wb") as file:
                    file.write(check_ins.content(written.sha256))
            else:       # an earlier file's
                artifacts.check_ins(path).unlink(missing_ok=True)
            logger.info("%d %s pairs, %s: %s", count, split, ",".join(fields), path)


def write_keys_and_queries(config: Config) -> None:
    """Write {train,test}_kq_pairs.json: one object per trajectory that has a pair.

    trajectory_id, user; start, end: local time of its first and last check-in (as a key, it is known only after `end`;
    as a query, only what ended before `start` may answer it); key: the text of all its check-ins; query: the text of
    its current part, those before the target, which is what is known when a prediction is asked for (may be empty).
    """
    with writing.alone(config.folder), writing.together() as new_file:
        split_rows = {split: samples.load(config, split) for split in SPLITS}
        for split, rows in split_rows.items():
            split_texts = texts(rows, KEY_FIELDS)
            time, user = rows["LocalTime"].tolist(), rows["UserId"].tolist()
            times, (trajectories, rows_of) = rows["Time"].to_numpy(), _grouped(rows["TrajectoryId"])
            path = config.folder / artifacts.key_query_pairs(split)
            with new_file(path, "wb") as file:
                count = write_json_array(file, (
                    {"trajectory_id": trajectory, "user": user[of[0]], "start": time[of[0]], "end": time[of[-1]],
                     "key": " ".join(split_texts[row] for row in of),
                     "query": " ".join(split_texts[row] for row in _current(of, times))}
                    for trajectory, of in zip(trajectories.tolist(), rows_of)))
            logger.info("%d %s trajectories: %s", count, split, path)


def load_similar(config: Config, split: str, split_rows: dict[str, pd.DataFrame]) -> dict[str, list[int]]:
    """{train,test}_key_top200.json: trajectory id, as text -> ids of train trajectories.

    Raises UserError if the file is missing, is no such object, or was made from other samples.
    """
    command = config.command("traj_sim.py")
    path = artifacts.require(config.folder / artifacts.similar_trajectories(split), command)
    try:
        listed = json_text.loads(path.read_bytes())
        mentioned = set().union(*listed.values())
        keys = {int(key) for key in listed if str(int(key)) == key}
        if len(keys) < len(listed) or any(type(other) is not int for other in mentioned):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise cli.UserError(f"{path}: not an object of trajectory ids to lists of ids; make it again with `{command}`"
                            ) from None
    for ids, owner in ((keys, split), (mentioned, "train")):
        strange = ids.difference(split_rows[owner]["TrajectoryId"].tolist())
        if strange:
            raise cli.UserError(f"{path}: trajectory {min(strange, key=str)} is not in "
                                f"{artifacts.split_sample(owner)}; make it again with `{command}`")
    return listed


def write_json_array(file: BinaryIO, objects: Iterable[dict]) -> int:
    """Write a JSON array, one object per line, as the objects come; returns how many there were."""
    count = 0
    for count, value in enumerate(objects, start=1):
        file.write((b"[\n" if count == 1 else b",\n") + json_text.dumps(value))
    file.write(b"\n]\n" if count else b"[]\n")
    return count


def command(stage: int, description: str) -> None:
    """The command line that both question scripts share: parse it, and write the files of `stage`."""
    default = prompts.STAGE_1_FIELDS if stage == 1 else prompts.FIELDS
    parser = cli.Parser(description)
    configs.add_flags(parser)
    parser.add_argument("-use_sim", type=cli.boolean, default=False, metavar="True|False",
                        help="add check-ins of similar trajectories (needs traj_sim.py's files)")
    if stage == 2:
        parser.add_argument("-use_pam", type=cli.boolean, default=False, metavar="True|False",
                            help="show <POI n> behind each POI id, for the POI Alignment Module")
    parser.add_argument("-fields", default=",".join(default), help="what a check-in shows, comma-separated; poi always")
    parser.add_argument("-max_history", type=int, help="check-ins of history at most (default: the YAML's)")
    parser.add_argument("-history_step", type=int, metavar="N",
                        help="a history longer than -max_history loses up to N-1 check-ins more, so that pairs in a "
                             "row begin alike (for --shared_prefix)")
    parser.add_argument("-cover", type=cli.boolean, default=False, metavar="True|False",
                        help="of train only as many pairs as show every check-in (for --loss_on poi_ids)")
    parser.add_argument("-thinned", type=cli.whole_number(1, 10_000), default=0, metavar="N",
                        help="N copies of train's pairs, from whose histories trajectories are missing at random")
    parser.add_argument("-missing", type=cli.share, metavar="SHARE",
                        help=f"with -thinned: the largest share of a history's trajectories (default: {MISSING})")
    if stage == 2:
        parser.add_argument("-answer", choices=ANSWERS, default=ANSWERS[0],
                            help="token: <GPS n> for POI id n, one token a POI (with -fields moment,gps)")
    parser.add_argument("-validate", type=cli.boolean, default=False, metavar="True|False",
                        help="questions of the validation split, too, asked like test's")
    args = parser.parse_args()
    config = configs.from_flags(args)
    if args.validate and args.use_sim:
        raise cli.UserError("-validate, -use_sim: traj_sim.py lists nothing for the validation split; leave one out")
    if args.missing is not None and not args.thinned:
        raise cli.UserError("-missing: goes with -thinned N, whose copies lack trajectories; give both, or neither")
    if args.max_history is not None:
        if not 0 <= args.max_history <= configs.MOST:
            raise cli.UserError(f"-max_history {short(args.max_history)}: too small or large; give 0 to {configs.MOST}")
        config = dataclasses.replace(config, max_history=args.max_history)
    if args.history_step is not None:
        if not 0 < args.history_step <= config.max_history:
            raise cli.UserError(f"-history_step {short(args.history_step)}: too small or large; give 1 to -max_history "
                                f"{config.max_history}")
        config = dataclasses.replace(config, history_step=args.history_step)
    fields = shown_fields(args.fields, default, stage, stage == 2 and args.use_pam)
    as_token = stage == 2 and args.answer == ANSWERS[1]
    if as_token and prompts.MOMENT not in fields:
        raise cli.UserError("-answer token: goes with -fields moment,gps, where the prompt's places are tokens, too")
    write(config, stage, args.use_sim, fields, args.cover, args.thinned,
          (*SPLITS, VALIDATE) if args.validate else SPLITS,
          MISSING if args.missing is None else args.missing, as_token)


def shown_fields(text: str, allowed: tuple[str, ...], stage: int, use_pam: bool = False) -> tuple[str, ...]:
    """Parse `-fields`, in the prompt's order, with `<POI n>` if `use_pam`.

    Raises UserError for an unknown one, or stage 1 without `gps`.
    """
    asked = {field.strip() for field in text.split(",")}
    allowed = (prompts.CLOCK, *[prompts.MOMENT] * (stage == 2), *allowed)
    if asked - set(allowed):
        raise cli.UserError(f"-fields: stage {stage} has no {short(min(asked - set(allowed)))}; choose among "
                            + ",".join(allowed))
    if stage == 1 and "gps" not in asked:
        raise cli.UserError("-fields: stage 1 trains the encoder behind the GPS tokens; add gps")
    if prompts.MOMENT in asked and asked - {"poi", "category"} != set(prompts.MOMENT_FIELDS):
        raise cli.UserError("-fields moment: a check-in is then two tokens, its time and its place; give -fields "
                            f"{','.join(prompts.MOMENT_FIELDS)}, with category or without, and no others")
    asked |= {"poi", prompts.ALIGNED} if use_pam else {"poi"}
    return tuple(field for field in prompts.ORDER if field in asked)


def check_places(config: Config, split_rows: dict[str, pd.DataFrame], places: pd.DataFrame) -> None:
    """Raises UserError if the GPS mapping `places` lacks a POI of one of the samples."""
    for split, rows in split_rows.items():
        missing = set(rows["PoiId"].tolist()).difference(places.index)
        if missing:
            raise cli.UserError(f"{config.folder / artifacts.gps_mapping(config.dataset_name)}: no row for POI "
                                f"{min(missing)} of {artifacts.split_sample(split)}; make both again with "
                                f"`{config.run_command}`")


def _write_lines(file: BinaryIO, objects: Iterable[dict]) -> int:
    count = 0
    for count, value in enumerate(objects, start=1):
        file.write(prompts.join(value["question"], value["answer"]).encode() + b"\n")
    return count


def _grouped(trajectory_ids: pd.Series) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct ids in rising order, and the row numbers of each in row order."""
    order = np.argsort(trajectory_ids.to_numpy(), kind="stable")
    ids, starts = np.unique(trajectory_ids.to_numpy()[order], return_index=True)
    return ids, np.split(order, starts[1:])


def _current(rows: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Of a trajectory's rows, in order of time, those before its target, which is the last; times: of all rows.

    Departure from the released code: there all that stands before the target counts, also of the target's own second,
    when nobody could know it yet; a check-in that stands twice would show the answer.
    """
    own = times[rows]
    return rows[:own.searchsorted(own[-1])]


def _similar(train: pd.DataFrame, listed: dict[str, list[int]], limit: int):
    """A function (trajectory, its start) -> the latest `limit` train rows of the trajectories listed for it, by time.

    One that has not ended before that start is passed over, whoever listed it: its check-ins would be a leak.
    """
    ids, rows_of = _grouped(train["TrajectoryId"])
    rows_by_id = dict(zip(ids.tolist(), rows_of))
    times = train["Time"].to_numpy()
    ends = {trajectory: times[rows[-1]] for trajectory, rows in rows_by_id.items()}

    def similar_to(trajectory: int, start: np.datetime64) -> np.ndarray:
        rows = [rows_by_id[other] for other in set(listed.get(str(trajectory), ())) if ends[other] < start]
        return np.sort(np.concatenate(rows))[max(0, sum(map(len, rows)) - limit):] if rows else np.empty(0, dtype=int)

    return similar_to
