"""An evaluation's folder without a model: a small city, and predictions that are made up."""
import json
from pathlib import Path

import numpy as np
import torch

from ga_llm.base import artifacts, prompts
from ga_llm.evaluation import baselines, metrics, pointer_alone
from ga_llm.pairs import spelling
from geo_encoder.encoder import GeoEncoderConfig, build_encoder
from geo_encoder.gps_tokens import read_gps_mapping
from geo_encoder.weights import save_encoder

PLACES = 12
USERS = 3
# Of each pair: the target's rank, the probability of the first guess. Six right, three near misses, the rest far.
RANKS = (1, 2, 1, 9, None, 1, 3, 1, 2, 1, 4, 1)
PROBABILITIES = (0.9, 0.35, 0.8, 0.1, 0.15, 0.9, 0.35, 0.6, 0.55, 0.95, 0.2, 1.0)
NEAR = (1, 6, 8)
CHECK_INS = "UserId,PoiId,PoiCategoryId,PoiCategoryName,Latitude,Longitude,LocalTime,TrajectoryId,Split\n"


def write(root: Path, category="Café {}", encoder=True, pointer=False) -> Path:
    """Below `root`: datasets/town, stage1/4, and stage2/checkpoint-4, which is returned.

    Even places lie beside the odd ones before them, the pairs of places 20 km apart. Each user goes 1, 2, 1, 3, then
    to places of the user's own; a test trajectory is the user at 5 and 6, then the target. pointer: whether the
    pointer alone has been trained, which has every target second.
    """
    folder = artifacts.preprocessed("town", root / "datasets")
    folder.mkdir(parents=True)
    place = {i: (40 + i % 2 / 300, -74 + (i - 1) // 2 * 0.25) for i in range(1, PLACES + 1)}
    mapping_path = folder / artifacts.gps_mapping("town")
    mapping_path.write_text("GPS_id,Latitude,Longitude\n" + "".join(f"{i},{a},{b}\n" for i, (a, b) in place.items()))
    mapping = read_gps_mapping(mapping_path)

    def row(user, poi, time, trajectory, split):
        name = '"' + category.format(poi).replace('"', '""') + '"'
        return f"{user},{poi},{poi},{name},{place[poi][0]},{place[poi][1]},{time},{trajectory},{split}\n"

    train, test, lines, targets = [], [], [], []
    for user in range(USERS):
        for day, poi in enumerate((1, 2, 1, 3, 4 + user, 7 + user), start=1):
            train.append(row(user, poi, f"2012-04-{day:02} 10:00:00", 10 * user, "train"))
    for pair in range(len(RANKS)):
        user, target, day = pair % USERS, 1 + pair % PLACES, 1 + pair
        times = [f"2012-05-{day:02} {hour}:00:00" for hour in (10, 12, 15)]
        test += [row(user, poi, time, 100 + pair, "test") for poi, time in zip((5, 6, target), times)]
        asked = prompts.question(user, [], [], ["POI id 5.", "POI id 6."], prompts.ask_poi(times[2], user, 1, PLACES))
        lines.append(prompts.join(asked, prompts.answer_poi(times[2], user, target)))
        targets.append(target)
    (folder / "train_sample.csv").write_text(CHECK_INS + "".join(train))
    (folder / "test_sample.csv").write_text(CHECK_INS + "".join(test))
    test_file = folder / artifacts.questions("test", "town", 2, use_sim=False)
    test_file.write_text("".join(f"{line}\n" for line in lines))

    asked = spelling.untokenized(lines)
    records = []
    for pair, (prompt, rank, chance) in enumerate(zip(asked, RANKS, PROBABILITIES)):
        beside = prompt.target + 1 if prompt.target % 2 else prompt.target - 1
        far = (prompt.target + 4) % PLACES + 1
        first = prompt.target if rank == 1 else beside if pair in NEAR else far
        others = [poi for poi in range(1, PLACES + 1) if poi not in (first, prompt.target)]
        order = [first, *others]
        if rank is not None and rank > 1:
            order.insert(rank - 1, prompt.target)
        values = [np.log(chance), *np.log(np.full(len(order) - 1, 0.001))]
        records.append({"pair": pair, "user": prompt.user, "time": prompt.time, "target": prompt.target, "fits": True,
                        "rank": rank, "top": [[poi, round(float(value), 4)] for poi, value in zip(order, values)]})
    ranking = metrics.Ranking(np.array([record["rank"] or np.inf for record in records]),
                              np.array([record["top"][0][0] for record in records]))
    known = baselines.read_train(folder / "train_sample.csv")
    if pointer:
        pointer_alone.write(folder, [{**record, "rank": 2, "top": [[11, -1.0]]} for record in records])
    found = metrics.report(asked, ranking, baselines.rankings(known, asked, folder), known, mapping, 7.5, "ga-llm",
                           "rank")
    km = metrics.distances(ranking.tops, targets, mapping)

    stage_1, checkpoint = root / "stage1", root / "stage2/checkpoint-4"
    checkpoint.mkdir(parents=True)
    encoder_path = stage_1 / "4" / artifacts.MERGED_ENCODER
    if encoder:
        encoder_path.parent.mkdir(parents=True)
        torch.manual_seed(1)
        config = GeoEncoderConfig(8, ngram=4)
        save_encoder(build_encoder(config).state_dict(), config, encoder_path)
    for training in (stage_1, root / "stage2"):
        training.mkdir(exist_ok=True)
        (training / artifacts.TRAINER_LOG).write_text("".join(
            json.dumps({"step": step, "loss": 3 / step, "elapsed_seconds": 60.0 * step}) + "\n"
            for step in range(1, 21)))
    settings = {"dataset_name": "town", "data_path": str(root / "datasets"), "test_file": str(test_file),
                "decoding": "rank", "gps_mapping_path": str(mapping_path),
                "geoencoder_path": str(encoder_path) if encoder else "None",
                "projector_path": "None", "test_type": "llm"}
    (checkpoint / artifacts.METRICS).write_text(json.dumps({
        **found, "date": "2026-11-25", "command": "python test_next_gps.py …",
        "git": {"commit": "0123abc", "dirty": False}, "machine": {"cpu": "a processor", "cores": 2, "gpus": []},
        "settings": settings}))
    (checkpoint / artifacts.PREDICTIONS).write_text("".join(
        json.dumps({**record, "km": round(float(distance), 3)}) + "\n" for record, distance in zip(records, km)))
    return checkpoint


def rewritten(checkpoint: Path, folder: Path, ranks: dict[int, int]) -> Path:
    """The same evaluation in `folder`, with other ranks of some pairs; a target of rank 1 comes first."""
    folder.mkdir()
    records = [json.loads(line) for line in (checkpoint / artifacts.PREDICTIONS).open()]
    for pair, rank in ranks.items():
        record = records[pair]
        others = [guess for guess in record["top"] if guess[0] != record["target"]]
        record["top"] = [*others[:rank - 1], [record["target"], others[0][1]], *others[rank - 1:]]
        record["rank"] = rank
    found = json.loads((checkpoint / artifacts.METRICS).read_text())
    found["all"]["model"]["Acc@1"]["value"] = float(np.mean([record["rank"] == 1 for record in records]))
    (folder / artifacts.METRICS).write_text(json.dumps(found))
    (folder / artifacts.PREDICTIONS).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
