"""Recommend: one user's check-ins and a time in, the most likely places out.

    python recommend.py --model exported --dataset_name nyc --check_ins my.csv --time "2013-01-05 18:00" -k 5 \
        [--user U] [--map map.html] [--json]

Works on a folder that export.py made and the data set's preprocessed folder. The CSV (`-`: stdin) has a header with a
time (time, local_time, datetime, …: local, as 2013-01-05 18:00:00) and a POI (poi, poi_id, venue_id, place_id, …: the
data set's raw ids; gps_id, encoded_id, …: encoded ones). Only check-ins before --time count. All POIs are ranked
exactly; probabilities are normalised over them, km are from the last check-in. The page that --map writes loads its
tiles and its JavaScript from the internet, which thereby learns the region.
"""
import argparse
import json
import logging
from pathlib import Path

import torch

from ga_llm.base import artifacts, writing
from ga_llm.base.cli import Parser, UserError, needed, run, whole_number
from ga_llm.llm import backbone, tree_attention
from ga_llm.serving import recommendation

log = logging.getLogger("recommend")


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder that export.py made")
    parser.add_argument("--dataset_name", help="default: that of the model")
    parser.add_argument("--data_path", default=str(artifacts.DATASETS), help="the root of the data sets' files")
    parser.add_argument("--check_ins", required=True, metavar="CSV", help="one user's; - is stdin")
    parser.add_argument("--time", required=True, help="when the next place is asked for, local")
    parser.add_argument("-k", type=whole_number(1), default=5, help="how many places")
    parser.add_argument("--user", help="the data set's raw id; default: a user that it does not have")
    parser.add_argument("--ids", choices=recommendation.IDS, help="what the POI column holds (default: by its name)")
    parser.add_argument("--map", type=Path, metavar="HTML", help="also write a map (replaces an earlier one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    args = parser.parse_args()
    args.at = recommendation.read_time(args.time)
    if args.at is None:
        raise UserError(f"--time {args.time[:60]!r}: no local time; give one such as \"2013-01-05 18:00\"")
    return args


def main():
    args = arguments()
    asking = recommendation.read_asking(args.model)
    places = recommendation.read_places(args.dataset_name or asking.dataset, args.data_path, asking)
    source = "stdin" if args.check_ins == "-" else args.check_ins
    past = recommendation.before(recommendation.read_check_ins(args.check_ins, places, args.ids), args.at, source)
    user = None if args.user is None else places.encode("user", args.user)
    if user is None:
        user = places.labels["user"]["unseen"]
        log.warning("%s: asked for as user %d, who stands for all that train does not have",
                    "no --user" if args.user is None else f"user {args.user} is not in train", user)
    if asking.questions["use_sim"]:
        log.warning("trained with check-ins of similar trajectories in the questions; this question has none")
    asked = recommendation.pair(past, args.at, user, places, asking)

    if args.map:
        needed("folium", "--map")     # told here, not when the model has run
    # Ranking hands the model a mask of the trie, which flash-attn does not take.
    tokenizer = backbone.load_tokenizer(str(args.model))
    dtype = getattr(torch, args.dtype or backbone.default_dtype())
    model = backbone.load_llm(str(args.model), asking.context, tree_attention.TREE, dtype).eval()
    recommendation.load_pointer(args.model, asking.beside, model, tokenizer, places)
    pois, probabilities, total, fits = recommendation.rank(model, tokenizer, places, asked, asking,
                                                           recommendation.shown(past, args.at, places, asking))
    if not fits:
        log.warning("the question is longer than the model's %d tokens: its earliest check-ins are cut off",
                    asking.context)
    found = recommendation.describe(pois[:args.k].tolist(), probabilities[:args.k].tolist(), past[-1].poi, places)

    history, current = recommendation.split(past, args.at, asking)
    at = args.at.strftime(recommendation.TIME_FORMAT)
    if args.json:
        print(json.dumps({"time": at, "user": user, "history": len(history), "current": len(current),
                          "probability_of_all_pois": total, "places": found}, indent=1, ensure_ascii=False))
    else:
        print(f"User {user} at {at}: {len(found)} of {len(pois):,} places, after {len(history)} check-ins of history\n"
              f"and {len(current)} of the current trajectory. Probabilities are normalised over all\n"
              f"places; km are from the last check-in.\n\n{recommendation.table(found)}")
    if args.map:
        from ga_llm.serving import places_map       # which imports folium
        shown = recommendation.visits(history + current or past[-1:], places)
        with writing.atomic_write(args.map) as file:
            file.write(places_map.draw(found, shown, f"Where to at {at}?"))
        log.info("wrote %s", args.map)


if __name__ == "__main__":
    run(main)
