"""What a report says of an output folder: the predictions beside the user-history baseline, their calibration, their
errors, examples, and the losses. No pictures and no HTML here.

A part of which a file is missing is `Absent`, and the others are shown all the same.
"""
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.base.reading import read_json
from ga_llm.evaluation import baselines, comparison, metrics
from ga_llm.pairs import sft_data, spelling
from ga_llm.serving.places import UNKNOWN, read_categories
from ga_llm.tables import chain, results
from ga_llm.training import run_log
from geo_encoder.gps_tokens import GPSMapping, read_gps_mapping

HISTORY = artifacts.USER_HISTORY
BINS = 10           # of the top-1 probability, equally wide
NEAR_KM = 1.0       # a wrong guess within it is a near miss
OUTCOMES = ("right", "near miss", "far miss")
EACH = 2            # examples of each kind
TOP = 5
MOST_SHOWN = 12     # check-ins of an example's trajectory
SEED = 0
AGAIN = f"make it again with `{comparison.MADE_BY}`"


class Absent(Exception):
    """Why a part of the report cannot be shown, in one line."""


@dataclasses.dataclass
class Evaluation:
    """What test_next_gps.py left in `folder`. The arrays are (pairs,), in the order of `records`.

    ranks, tops: as in metrics.Ranking; km: first guess to target, nan where unknown; probability: of the first guess,
    nan where it has none (a sampled answer).
    """
    folder: Path
    metrics: dict
    settings: dict[str, str]
    records: list[dict]
    ranks: np.ndarray
    tops: np.ndarray
    km: np.ndarray
    probability: np.ndarray


@dataclasses.dataclass
class Baseline:
    """The count of the user's own history on the same pairs. ranks, tops, km: as in `Evaluation`.

    share: (pairs,), that of its first guess among the user's check-ins, its probability; nan without any.
    """
    train: pd.DataFrame
    prompts: list[spelling.TestPrompt]
    ranks: np.ndarray
    tops: np.ndarray
    km: np.ndarray
    share: np.ndarray


@dataclasses.dataclass
class Reliability:
    """Of each bin of the stated probability, (bins,): pairs, mean probability, share that was right (nan: no pairs).

    ece: the expected calibration error, the mean over all pairs of |probability - share right| of their bins.
    """
    n: np.ndarray
    probability: np.ndarray
    right: np.ndarray
    ece: float


def read_evaluation(folder: Path, flag: str = "--output_dir") -> Evaluation:
    """Raises UserError if metrics.json and predictions.jsonl are missing, damaged, or not of one evaluation."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder; give stage 2's checkpoint-N that "
                        f"`{comparison.MADE_BY}` has tested")
    path = artifacts.require(folder / artifacts.METRICS, comparison.MADE_BY)
    found = results.read(path)
    settings = found.get("settings")
    if not isinstance(settings, dict) or not all(isinstance(value, str) for value in settings.values()):
        raise UserError(f"{path}: has no settings; {AGAIN}")
    artifacts.dataset_name(settings.get("dataset_name", ""), f"{path}: dataset_name")
    if "Acc@1" not in (found["all"].get(HISTORY) or {}):
        raise UserError(f"{path}: has no {HISTORY}, without which no result is shown; {AGAIN}")
    path = folder / artifacts.PREDICTIONS
    records = list(comparison.read(path).values())
    if not records:
        raise UserError(f"{path}: no pairs; {AGAIN}")
    for record in records:
        if not all(type(poi) is int and (value is None or type(value) in (int, float)) for poi, value in record["top"]):
            raise UserError(f"{path}: pair {record['pair']}: top holds something else than [POI id, log-probability]; "
                            f"{AGAIN}")
    ranks = np.array([np.inf if record["rank"] is None else record["rank"] for record in records])
    _check_figures(found["all"]["model"], ranks, path)
    first = [record["top"][0] if record["top"] else (metrics.NO_POI, None) for record in records]
    return Evaluation(folder, found, settings, records, ranks, np.array([poi for poi, _ in first]),
                      np.array([record["km"] for record in records], dtype=np.float64),
                      np.array([np.nan if value is None else probability(value) for _, value in first]))


def probability(log_probability: float) -> float:
    return float(np.exp(min(0.0, log_probability)))     # rounding may have lifted it above 0


def _check_figures(summary: dict, ranks: np.ndarray, path: Path) -> None:
    """The summary in metrics.json must be of these ranks."""
    if summary["n"] != len(ranks) or abs(summary["Acc@1"]["value"] - np.mean(ranks == 1)) > 1e-9:
        raise UserError(f"{path}: Acc@1 is {np.mean(ranks == 1):.4f} of {len(ranks)} pairs, which is not what "
                        f"{artifacts.METRICS} beside it says; make both again with `{comparison.MADE_BY}`")


def data_folder(evaluation: Evaluation, data_path: Path | str | None = None) -> Path:
    """The preprocessed folder of the test, or the same data set's below `data_path`."""
    settings = evaluation.settings
    return artifacts.preprocessed(settings["dataset_name"], data_path or settings.get("data_path", artifacts.DATASETS))


def read_mapping(evaluation: Evaluation, folder: Path, given: Path | str | None, data_path_given: bool) -> GPSMapping:
    """The GPS mapping that is given, of the test, or in `folder`. Raises Absent if there is none."""
    if given:
        return read_gps_mapping(given)
    of_test = [] if data_path_given else [Path(evaluation.settings.get("gps_mapping_path", ""))]
    name = artifacts.gps_mapping(evaluation.settings["dataset_name"])
    return read_gps_mapping(_first([*of_test, folder / name], "the GPS mapping", "--gps_mapping_path"))


def read_baseline(evaluation: Evaluation, folder: Path, mapping: GPSMapping, data_path_given: bool) -> Baseline:
    """Raises Absent if questions or train check-ins are missing, UserError if they are not those of the test."""
    name = Path(evaluation.settings.get("test_file", "")).name or "test questions"
    of_test = [] if data_path_given else [Path(evaluation.settings.get("test_file", ""))]
    test_file = _first([*of_test, folder / name], "the test questions", "--data_path")
    train = baselines.read_train(_first([folder / artifacts.split_sample("train")], "train's check-ins", "--data_path"))
    lines = sft_data.read_test_pairs(test_file, comparison.MADE_BY)
    spelling.read_answers(lines, test_file)
    all_prompts = spelling.untokenized(lines)
    prompts = []
    for record in evaluation.records:
        prompt = all_prompts[record["pair"]] if 0 <= record["pair"] < len(all_prompts) else None
        if prompt is None or (prompt.user, prompt.time, prompt.target) != (record["user"], record["time"],
                                                                           record["target"]):
            raise UserError(f"{test_file}: line {record['pair'] + 1} is not pair {record['pair']} of "
                            f"{evaluation.folder / artifacts.PREDICTIONS}; give the --data_path of the test, or test "
                            "again")
        prompts.append(prompt)
    found = baselines.user_history(train, prompts)
    _check_figures(evaluation.metrics["all"][HISTORY], found.ranks, folder / artifacts.split_sample("train"))
    visits = [Counter(history) for history in metrics.histories(prompts, train)]
    share = [max(count.values()) / count.total() if count else np.nan for count in visits]
    targets = [prompt.target for prompt in prompts]
    return Baseline(train, prompts, found.ranks, found.tops, metrics.distances(found.tops, targets, mapping),
                    np.array(share))


def _first(paths: Sequence[Path], what: str, flag: str) -> Path:
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise Absent(f"{what} are not at {paths[-1]}; give {flag}" if what.endswith("s") else
                     f"{what} is not at {paths[-1]}; give {flag}")
    return found


def reliability(stated: np.ndarray, right: np.ndarray) -> Reliability:
    """stated: (pairs,) probabilities, of which nan are left out; right: (pairs,) bool. Raises Absent if none is left.

    Bins are closed on the left; the last one holds 1, too.
    """
    known = ~np.isnan(stated)
    if not known.any():
        raise Absent("the predictions have no log-probabilities (--decoding sample gives none)")
    stated, right = stated[known], np.asarray(right, dtype=bool)[known]
    of_bin = np.minimum((stated * BINS).astype(int), BINS - 1)
    n = np.bincount(of_bin, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean, share = (np.bincount(of_bin, values, minlength=BINS) / n for values in (stated, right))
    return Reliability(n, mean, share, float(np.nansum(n * np.abs(mean - share)) / n.sum()))


def wilson(right: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a share, low and high (Wilson, JASA 1927). right: the share; n: of how many."""
    z = 1.959964
    centre, half = right + z * z / (2 * n), z * np.sqrt(right * (1 - right) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def outcomes(evaluation: Evaluation) -> np.ndarray:
    """(pairs,) the first guess's, by its position in OUTCOMES; far is also what has no distance."""
    return np.where(evaluation.ranks == 1, 0, np.where(evaluation.km <= NEAR_KM, 1, 2))


def choose(evaluation: Evaluation) -> list[tuple[str, int]]:
    """(kind, index of the pair) of the examples: EACH of a kind, at equal steps through its pairs in their order."""
    found, of = [], outcomes(evaluation)
    for number, kind in enumerate(OUTCOMES):
        pairs = np.flatnonzero(of == number)
        steps = sorted({(i + 1) * len(pairs) // (EACH + 1) for i in range(EACH)}) if len(pairs) else []
        found += [(kind, int(pairs[step])) for step in steps]
    return found


def examples(evaluation: Evaluation, baseline: Baseline, mapping: GPSMapping, folder: Path) -> list[dict]:
    """Of each chosen pair: kind, pair, user, time, rank, check_ins, hidden (earlier ones), target, top, history.

    A place is {"poi", "category", "latitude", "longitude", "km" (to the target)}; check_ins' have "time", top's
    "probability". Times of check-ins are the split's, None where it does not have the trajectory.
    """
    categories = read_categories(folder / artifacts.split_sample("train"), mapping.ids.tolist(), -1)
    places = dict(zip(mapping.ids.tolist(), zip(mapping.latitude.tolist(), mapping.longitude.tolist())))
    of_pair = trajectories(evaluation, folder)

    def place(poi: int, target: int, **more) -> dict:
        km, = metrics.distances([poi], [target], mapping)
        latitude, longitude = places.get(poi, (np.nan, np.nan))
        return {"poi": poi, "category": categories.get(poi, (UNKNOWN,))[0], "latitude": latitude,
                "longitude": longitude, "km": float(km), **more}

    found = []
    for kind, i in choose(evaluation):
        record, prompt = evaluation.records[i], baseline.prompts[i]
        target = record["target"]
        check_ins = of_pair.get((prompt.user, prompt.time, target), [(None, poi) for poi in prompt.current])
        top = [place(poi, target, probability=None if value is None else probability(value))
               for poi, value in record["top"][:TOP]]
        guess = int(baseline.tops[i])
        found.append({
            "kind": kind, "pair": record["pair"], "user": record["user"], "time": record["time"],
            "rank": record["rank"], "hidden": max(0, len(check_ins) - MOST_SHOWN), "target": place(target, target),
            "check_ins": [place(poi, target, time=time) for time, poi in check_ins[-MOST_SHOWN:]], "top": top,
            "history": None if guess == metrics.NO_POI else place(guess, target)})
    return found


def trajectories(evaluation: Evaluation, folder: Path) -> dict[tuple[int, str, int], list[tuple[str, int]]]:
    """Those of the split that was tested, as of `read_trajectories`."""
    split = evaluation.metrics.get("split")
    return read_trajectories(folder / artifacts.split_sample(split if split in artifacts.SPLITS else "test"))


def read_trajectories(path: Path) -> dict[tuple[int, str, int], list[tuple[str, int]]]:
    """{(user, local time, POI) of the target: [(local time, POI) of the check-ins before it]}; empty without a file."""
    if not path.is_file():
        return {}
    rows = baselines.read_check_ins(path, [*baselines.COLUMNS, "LocalTime"])
    found = {}
    for _, own in rows.groupby("TrajectoryId", sort=False):
        *before, (user, time, poi) = zip(own["UserId"].tolist(), own["LocalTime"].tolist(), own["PoiId"].tolist())
        found.setdefault((user, time, poi), [(at, where) for _, at, where in before if at < time])
    return found


def read_losses(evaluation: Evaluation, geoencoder_path: Path | str | None = None) -> dict[str, list[dict]]:
    """{training: its log's lines that have a loss, at least two, or a validation loss}. Raises Absent if no log is
    found."""
    stage_2 = training_folder(evaluation.folder)
    folders = {}
    # What stage 2 was given comes first: the encoder that was tested may be stage 2's own.
    encoder = (_trained_with(stage_2, evaluation.folder, "geoencoder_path") or geoencoder_path
               or evaluation.settings.get("geoencoder_path"))
    for name, given in (("stage 1: the geo-encoder (GCIM)", encoder),
                        ("stage 1: the POI projector (PAM)", evaluation.settings.get("projector_path"))):
        if given not in (None, "", "None"):
            folders[name] = next((folder for folder in list(Path(given).parents)[:2]
                                  if (folder / artifacts.TRAINER_LOG).is_file()), None)
    folders["stage 2: the LLM"] = stage_2
    found, taken = {}, set()
    for name, folder in reversed(folders.items()):      # an encoder that stage 2 has trained lies in its folder
        if folder is None or folder.resolve() in taken:
            continue
        taken.add(folder.resolve())
        lines = [line for line in run_log.read_log(folder / artifacts.TRAINER_LOG)
                 if type(line.get("loss", line.get("eval_loss"))) in (int, float)]
        if sum("loss" in line for line in lines) > 1:
            found[name] = lines
    if not found:
        raise Absent(f"there is no {artifacts.TRAINER_LOG} of two lines or more beside {evaluation.folder}, or where "
                     "the encoder lies")
    return dict(reversed(found.items()))


def training_folder(folder: Path) -> Path | None:
    """Where the training's log of a tested checkpoint lies: above it, or in the step that run_experiment.py linked."""
    for parent in (folder, *folder.parents[:2]):
        if (parent / artifacts.TRAINER_LOG).is_file():
            return parent
    for parent in folder.parents[:4]:
        if (parent / chain.DONE).is_file():
            for name in read_json(parent / chain.DONE).get("steps") or []:
                step = parent.parent / Path(str(name)).name / chain.OUT
                if str(name).startswith("stage2-") and (step / artifacts.TRAINER_LOG).is_file():
                    return step
    return None


def _trained_with(folder: Path | None, tested: Path, flag: str) -> str | None:
    """The file that the training in `folder` was given by a flag."""
    files = start_of(folder, tested).get("files")
    path = files[flag].get("path") if isinstance(files, dict) and isinstance(files.get(flag), dict) else None
    return path if isinstance(path, str) else None


def start_of(folder: Path | None, tested: Path) -> dict:
    """Of the run.json in a training's `folder`: the start that came to the tested checkpoint; {} if it is not told."""
    return {} if folder is None else run_log.read_start(folder / artifacts.RUN, run_log.step_of(tested))
