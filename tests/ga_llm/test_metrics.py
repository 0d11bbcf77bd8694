"""Metrics by hand, intervals against the binomial formula, baselines by hand and on real NYC."""
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ga_llm import baselines, metrics, prompts, ranking

ROOT = Path(__file__).parents[2]
NYC = Path(os.environ.get("GA_LLM_DATA", ROOT.parent / "shared/data")) / "nyc/raw"


def test_metrics_by_hand():
    result = metrics.summary([1, 2, 5, 6, 25, math.inf])
    assert result["n"] == 6
    values = {name: metric["value"] for name, metric in result.items() if name != "n"}
    assert values == pytest.approx({"Acc@1": 1 / 6, "Acc@5": 3 / 6, "Acc@10": 4 / 6, "Acc@20": 4 / 6,
                                    "MRR": (1 + 1 / 2 + 1 / 5 + 1 / 6 + 1 / 25) / 6, "MRR@5": (1 + 1 / 2 + 1 / 5) / 6})
    assert metrics.summary([]) == {"n": 0}


def test_interval_is_that_of_a_binomial():
    hits = [1] * 300 + [9] * 700
    metric = metrics.summary(hits, draws=5000)["Acc@1"]
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert metric["value"] == 0.3
    assert (metric["low"], metric["high"]) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)


def prompt(pair, user, current, target, history=()):
    text = prompts.join(prompts.question(user, [], [f"POI id {i}." for i in history], [f"POI id {i}." for i in current],
                                         prompts.ask_poi("t", user, 0, 9)), prompts.answer_poi("t", user, target))
    start, target, _ = ranking.answer_id(text)
    return ranking.TestPrompt(pair, text[:start], target, [], 0, True)


def test_baselines_by_hand():
    train = pd.DataFrame({"UserId": [1, 1, 1, 2, 2, 2], "PoiId": [7, 8, 8, 9, 9, 9]})
    test_prompts = [prompt(0, 1, [7, 5], 7), prompt(1, 1, [], 7), prompt(2, 1, [5], 9), prompt(3, 2, [9], 9),
                    prompt(4, 1, [8, 7, 7], 8)]
    assert baselines.ranks(train, test_prompts) == {
        "user-history frequency": [1, 2, math.inf, 1, 2],     # 7 and 8 twice each: 7 was first; the last: 3 against 3
        "popularity": [3, 3, 1, 1, 2]}


def test_prompt_parts():
    p = prompt(0, 3, [4, 5], 6, history=[1, 2])
    assert (p.user, p.shown, p.current) == (3, [1, 2, 4, 5], [4, 5])
    foreign = ranking.TestPrompt(0, "<question>: was at POI id 4 <answer>: goes to POI id ", 6, [], 0, True)
    assert (foreign.user, foreign.current) == (None, [4])


def test_report_and_table():
    test_prompts = [prompt(0, 1, [7], 7), prompt(1, 1, [7], 8)]
    test_prompts[1].fits = False
    report = metrics.report(test_prompts, {0: {"rank": 1}, 1: {"rank": None}}, {"popularity": [2, 1]}, seconds=4)
    assert report["all"]["model"]["Acc@1"]["value"] == 0.5 and report["fits"]["model"]["Acc@1"]["value"] == 1.0
    assert report["fits"]["popularity"]["n"] == 1 and report["target_in_prompt"] == 0.5
    assert report["prompts_per_second"] == 0.5
    text = metrics.text(report, "rank")
    assert "0.5000 [0.0000, 1.0000]" in text and text.count("popularity") == 2


@pytest.mark.slow
@pytest.mark.skipif(not NYC.is_dir(), reason="the real NYC check-ins are not here")
def test_user_history_on_real_nyc(tmp_path):
    """Spec: Acc@1 .2267, Acc@5 .5190, MRR .3583 on 1,447 pairs."""
    raw = tmp_path / "data-preprocess/data/nyc/raw"
    raw.parent.mkdir(parents=True)
    raw.symlink_to(NYC)
    (tmp_path / "best_conf").symlink_to(ROOT / "best_conf")
    for command in (["run.py", "-f", "best_conf/nyc.yml"],
                    ["process_llm_gps.py", "-dataset_name", "nyc", "-fields", "poi"]):
        subprocess.run([sys.executable, ROOT / "data-preprocess" / command[0], *command[1:]], cwd=tmp_path, check=True)
    folder = tmp_path / "datasets/nyc/preprocessed"
    lines = (folder / "test_qa_pairs_kqt_200items_nyc_llm_without_sim_gps.txt").read_text().splitlines()
    test_prompts = []
    for i, line in enumerate(lines):
        start, target, _ = ranking.answer_id(line)
        test_prompts.append(ranking.TestPrompt(i, line[:start], target, [], 0, True))
    found = baselines.ranks(baselines.read_train(folder / "train_sample.csv"), test_prompts)["user-history frequency"]
    result = metrics.summary(found, draws=10)
    assert result["n"] == 1447
    assert [round(result[name]["value"], 4) for name in ("Acc@1", "Acc@5", "MRR")] == [0.2267, 0.5190, 0.3583]
    assert np.isinf(found).sum() > 0
