"""Recommend: check-ins and a time in, the most likely places out.

    python recommend.py --model exported --dataset_name nyc --check_ins my.csv --time "2013-01-05 18:00" -k 5 \
        [--user U] [--exclude visited] [--within KM] [--candidates FILE] [--map map.html] [--json]
    python recommend.py --model exported --check_ins everyone.csv --all_users --time "2013-01-05 18:00" > found.jsonl

Works on a folder that export.py made and the data set's preprocessed folder. The CSV (`-`: stdin) has a header with a
time (time, local_time, datetime, …: local, as 2013-01-05 18:00:00) and a POI (poi, poi_id, venue_id, place_id, …: the
data set's raw ids; gps_id, encoded_id, …: encoded ones); with --all_users also a user (user, user_id: the data set's
raw ids), each of whom gets a line of JSON. Only check-ins before --time count. All POIs are ranked exactly;
probabilities are normalised over them, km are from the last check-in. Filters leave the model's own probability of each
place as it is, and what they exclude costs nothing. The page that --map writes loads its tiles and its JavaScript from
the internet, which thereby learns the region.
"""
import argparse
import json
import logging
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ga_llm.base import artifacts, writing
from ga_llm.base.cli import Parser, UserError, needed, run, show_progress, whole_number
from ga_llm.llm import backbone, tree_attention
from ga_llm.serving import check_in_files, recommendation
from ga_llm.serving.places import Places, read_places, user_ids

log = logging.getLogger("recommend")


def kilometres(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of km from 0, got {text!r}")
    return number


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder that export.py made")
    parser.add_argument("--dataset_name", help="default: that of the model")
    parser.add_argument("--data_path", default=str(artifacts.DATASETS), help="the root of the data sets' files")
    parser.add_argument("--check_ins", required=True, metavar="CSV", help="one user's; - is stdin")
    parser.add_argument("--all_users", action="store_true", help="--check_ins of many users; a line of JSON for each")
    parser.add_argument("--time", required=True, help="when the next place is asked for, local")
    parser.add_argument("-k", type=whole_number(1), default=5, help="how many places")
    parser.add_argument("--user", help="the data set's raw id; default: a user that it does not have")
    parser.add_argument("--ids", choices=check_in_files.IDS, help="what the POI column holds (default: by its name)")
    parser.add_argument("--exclude", choices=("visited",), help="visited: no place of the check-ins before --time")
    parser.add_argument("--within", type=kilometres, metavar="KM", help="no place farther from the last check-in")
    parser.add_argument("--candidates", metavar="FILE", help="only these: a POI id a line, or a CSV with a POI column")
    parser.add_argument("--map", type=Path, metavar="HTML", help="also write a map (replaces an earlier one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    args = parser.parse_args()
    for flag in ("user", "map"):
        if args.all_users and getattr(args, flag):
            raise UserError(f"--{flag} is for one user; leave it out, or --all_users")
    args.at = check_in_files.read_time(args.time)
    if args.at is None:
        raise UserError(f"--time {args.time[:60]!r}: no local time; give one such as \"2013-01-05 18:00\"")
    return args


def load(args, asking: recommendation.Asking, places: Places) -> recommendation.Recommender:
    # Ranking hands the model a mask of the trie, which flash-attn does not take.
    tokenizer = backbone.load_tokenizer(str(args.model))
    dtype = getattr(torch, args.dtype or backbone.default_dtype())
    model = backbone.load_llm(str(args.model), asking.context, tree_attention.TREE, dtype).eval()
    recommendation.load_pointer(args.model, asking.beside, model, tokenizer, places)
    return recommendation.Recommender(model, tokenizer, places, asking)


def tell_all(args, recommender: recommendation.Recommender, users: dict, ids: list[int], filters) -> None:
    """A line of JSON for each user, as they come."""
    cut = 0
    for (raw, check_ins), user in zip(tqdm(users.items(), unit="user", disable=not show_progress()), ids):
        past = [check_in for check_in in check_ins if check_in.time < args.at]
        if past:
            answer = recommender.answer(user, past, args.at, args.k, filters)
            cut += not answer["fits"]
        else:
            answer = {"time": f"{args.at}", "user": user, "places": [],
                      "note": "no check-in before the time at a place that the model knows"}
        tqdm.write(json.dumps({"user_id": raw, **answer}, ensure_ascii=False), file=sys.stdout)
        sys.stdout.flush()
    if cut:
        log.warning("%d questions are longer than the model's %d tokens (\"fits\" is false): their earliest check-ins "
                    "are cut off", cut, recommender.asking.context)


def main():
    args = arguments()
    asking = recommendation.read_asking(args.model)
    places = read_places(args.dataset_name or asking.dataset, args.data_path, asking.places, asking.dataset)
    if args.all_users:
        users = check_in_files.read_all_users(args.check_ins, places, args.ids)
    else:
        users = {args.user: check_in_files.read_check_ins(args.check_ins, places, args.ids)}
        source = "stdin" if args.check_ins == "-" else args.check_ins
        past = check_in_files.before(users[args.user], args.at, source)
    allowed = None if args.candidates is None else check_in_files.read_candidates(args.candidates, places, args.ids)
    filters = recommendation.Filters(args.exclude != "visited", args.within, allowed)
    ids = user_ids(list(users), places)
    if asking.questions["use_sim"]:
        log.warning("trained with check-ins of similar trajectories in the questions; these have none")
    if args.map:
        needed("folium", "--map")     # told here, not when the model has run
    recommender = load(args, asking, places)
    if args.all_users:
        return tell_all(args, recommender, users, ids, filters)

    answer = recommender.answer(*ids, past, args.at, args.k, filters)
    if not answer["fits"]:
        log.warning("the question is longer than the model's %d tokens: its earliest check-ins are cut off",
                    asking.context)
    print(json.dumps({"user_id": args.user, **answer}, indent=1, ensure_ascii=False) if args.json else
          recommendation.text(answer))
    if args.map and answer["places"]:
        from ga_llm.serving import places_map       # which imports folium
        history, current = recommendation.split(past, args.at, asking)
        shown = recommendation.visits(history + current or past[-1:], places)
        with writing.atomic_write(args.map) as file:
            file.write(places_map.draw(answer["places"], shown, f"Where to at {answer['time']}?"))
        log.info("wrote %s", args.map)
    elif args.map:
        log.warning("%s: not written, for no place is left", args.map)


if __name__ == "__main__":
    run(main)
