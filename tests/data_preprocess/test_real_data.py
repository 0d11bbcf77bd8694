"""The counts of the paper on real check-ins, which are looked for beside the repository (or in $GA_LLM_DATA)."""
import json
from pathlib import Path

import pandas as pd
import pytest

from checkins import config, readers, samples
from ga_llm.base import artifacts, prompts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nyc(real_data, root, script):
    """NYC's files read where they lie, as .gz."""
    text = (ROOT / "best_conf" / "nyc.yml").read_text()
    Path("best_conf/nyc.yml").write_text(text.replace("data-preprocess/data/nyc/raw", str(real_data / "nyc" / "raw")))
    script("run.py", "-f", "best_conf/nyc.yml")
    return config.load("best_conf/nyc.yml")


def test_nyc(nyc, script):
    stats = json.loads((nyc.folder / "stats.json").read_text())
    assert stats["train"] == {"users": 1047, "pois": 4980, "categories": 318, "trajectories": 11019, "check_ins": 83449}
    assert stats["test"]["trajectories"] == 1447
    assert pd.read_csv(nyc.folder / "nyc_gps_mapping.csv")["GPS_id"].tolist() == list(range(4980))

    for stage, name in ((1, "process_projector_gps_stage1.py"), (2, "process_llm_gps.py")):
        script(name, "-dataset_name", "nyc", "-use_sim", "False")
        train = (nyc.folder / artifacts.questions("train", "nyc", stage, False)).read_bytes()
        assert train.count(b'{"question"') == 11019
        test = (nyc.folder / artifacts.questions("test", "nyc", stage, False)).read_text().splitlines()
        assert len(test) == 1447
        last = samples.load(nyc, "test").groupby("TrajectoryId")["PoiId"].last()
        pattern = prompts.POI_ID if stage == 2 else prompts.GPS_TOKEN
        assert [int(pattern.findall(line)[-1]) for line in test] == last.tolist()


def test_nyc_trajectories_cut_by_the_split_keep_one_id(nyc):
    sample = pd.read_csv(nyc.folder / "sample.csv")
    assert (sample.groupby("TrajectoryId")["Split"].nunique() > 1).sum() == 10
    assert sample.groupby("TrajectoryId")["UserId"].nunique().max() == 1


def test_tsmc2014(real_data, root, script):
    """Real New York in Tokyo's format: filter, split, isolation and trajectories hold on the output."""
    text = (ROOT / "best_conf" / "tky.yml").read_text()
    raw = str(real_data / "nyc" / "nyc_10core_tsmc8col.txt")
    Path("best_conf/tky.yml").write_text(text.replace("data-preprocess/data/tky/raw/dataset_TSMC2014_TKY.txt", raw))
    script("run.py", "-f", "best_conf/tky.yml")
    conf = config.load("best_conf/tky.yml")
    sample = pd.read_csv(conf.folder / "sample.csv", parse_dates=["LocalTime"])
    last = sample[sample["Split"] == "train"]["LocalTime"].max()
    assert (sample[sample["Split"] != "train"]["LocalTime"] >= last).all()
    gaps = sample.groupby("TrajectoryId")["LocalTime"].diff()
    assert gaps.max() <= pd.Timedelta(hours=24) and sample.groupby("TrajectoryId").size().min() >= 2
    places = pd.read_csv(conf.folder / "tky_gps_mapping.csv")
    assert places["GPS_id"].tolist() == list(range(1, len(places) + 1))
    script("process_llm_gps.py", "-dataset_name", "tky", "-use_sim", "False")
    lines = (conf.folder / artifacts.questions("test", "tky", 2, False)).read_text().splitlines()
    assert len(lines) == pd.read_csv(conf.folder / "test_sample.csv")["TrajectoryId"].nunique()


def test_tokyo_as_data_portals_have_it(real_data, root):
    """The first days of the real file, with a header line and commas, and beside it the same with tabs and without."""
    raw = real_data / "tky" / "dataset_TSMC2014_TKY_first_days.csv.gz"
    if not raw.is_file():
        pytest.skip(f"no {raw}")
    text = (ROOT / "best_conf" / "tky.yml").read_text()
    name = "data-preprocess/data/tky/raw/dataset_TSMC2014_TKY"
    Path("best_conf/tky.yml").write_text(text.replace(f"{name}.txt", str(raw).replace(".csv.gz", ".txt")))
    found = readers.read(config.load("best_conf/tky.yml"))
    plain = pd.read_csv(raw, dtype=str)
    assert len(found) == len(plain) == 8261
    assert (found["LocalTime"].min(), found["LocalTime"].max()) == tuple(
        (pd.to_datetime(plain["utcTimestamp"], format="%a %b %d %H:%M:%S +0000 %Y") + pd.Timedelta(minutes=540)
         ).agg(["min", "max"]))
    Path("raw.txt").write_bytes(plain.to_csv(sep="\t", header=False, index=False).encode("latin-1"))
    Path("best_conf/tky.yml").write_text(text.replace(f"{name}.txt", "raw.txt"))
    pd.testing.assert_frame_equal(readers.read(config.load("best_conf/tky.yml")), found)
