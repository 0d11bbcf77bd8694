"""results.py's table, on made-up metrics.json files whose figures are known."""
import csv
import io
import json

import numpy as np
import pytest

from ga_llm import results
from ga_llm.cli import UserError

PUBLISHED = {"Acc@1": 0.3988}


def summary(ranks):
    def cell(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1}
    ranks = np.array(ranks, dtype=float)
    return {"n": len(ranks), "Acc@1": cell((ranks <= 1).mean()), "Acc@5": cell((ranks <= 5).mean()),
            "MRR": cell((1 / ranks).mean()), "MRR@5": cell(np.where(ranks <= 5, 1 / ranks, 0).mean())}


def measured(folder, ranks, baseline):
    """metrics.json and predictions.jsonl of an evaluation with these ranks."""
    folder.mkdir(parents=True)
    found = {"model": summary(ranks), "user-history frequency": summary(baseline)}
    (folder / "metrics.json").write_text(json.dumps({
        "all": found, "groups": {"user activity": {"inactive": {"model": summary(ranks[:10]),
                                                                "user-history frequency": summary(baseline[:10])}}},
        "protocol": "ga-llm", "decoding": "rank", "date": "2026-11-24", "command": "python test_next_gps.py …",
        "machine": {"cpu": "a processor", "cores": 2, "gpus": []}}))
    with (folder / "predictions.jsonl").open("w") as file:
        for pair, rank in enumerate(ranks):
            file.write(json.dumps({"pair": pair, "user": pair % 7, "time": "2012-01-01 00:00:00", "target": 5,
                                   "fits": True, "rank": rank, "top": [[5 if rank == 1 else 6, -0.1]], "km": 1.0}) + "\n")


def link(work_dir, name, folder, **about):
    path = work_dir / "cpu" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"experiment": name, "scale": "cpu", "table": "modules", "row": name, "model": "tiny",
                                "metrics": f"steps/{folder}/metrics.json", "command": f"python run {name}", **about}))


@pytest.fixture
def work_dir(tmp_path):
    """Three rows: `worse` ranks 40 of 100 targets second that the reference ranks first, `same` is one pair off."""
    base, baseline = [1] * 60 + [2] * 40, [3] * 100
    for name, ranks in (("main", base), ("worse", [1] * 20 + [2] * 80), ("same", [1] * 59 + [2] * 41)):
        measured(tmp_path / "steps" / name, ranks, baseline)
        link(tmp_path, name, name, reference="main", **({"published": PUBLISHED, "source": "GA-LLM"} if name == "main"
                                                         else {}))
    return tmp_path


def test_rows_with_differences_and_baselines(work_dir):
    rows = {row.name: row for row in results.gather(work_dir)}
    assert list(rows) == ["main", "same", "worse"] and rows["main"].differences is None
    worse, same = rows["worse"].differences["Acc@1"], rows["same"].differences["Acc@1"]
    assert worse["difference"] == pytest.approx(-0.4) and results.verdict(worse) == "worse"
    assert same["difference"] == pytest.approx(-0.01) and results.verdict(same) == "within noise"
    text = results.markdown(list(rows.values()))
    main = next(line for line in text.splitlines() if line.startswith("| main"))
    assert main.startswith("| main | 100 | .3988 | .6000 [.5000, .7000] | 1.0000 [.9000, 1.1000] |")
    assert text.count("| user-history frequency | 100 |") == 1 and "-0.4000" in text and "not verified here" in text
    assert "a processor, 2 cores" in text and "`python run worse`" in text and "published: GA-LLM" in text


def test_csv_holds_the_same(work_dir):
    found = list(csv.DictReader(io.StringIO(results.table(results.gather(work_dir)))))
    main = next(row for row in found if row["row"] == "main")
    assert (main["Acc@1 published"], main["Acc@1 ours"], main["n"]) == ("0.3988", "0.6", "100")
    assert float(main["user-history frequency MRR"]) == pytest.approx(1 / 3) and main["reference"] == ""
    assert [row["Acc@1 verdict"] for row in found] == ["", "within noise", "worse"]


def test_a_group_of_another_rows_pairs(work_dir):
    link(work_dir, "cold", "main", group=["user activity", "inactive"], reference="main")
    row = next(row for row in results.gather(work_dir) if row.name == "cold")
    assert row.n == 10 and row.found["model"]["Acc@1"]["value"] == 1.0 and row.differences is None


def test_files_of_no_experiment_stand_by_their_folder(work_dir, tmp_path):
    measured(tmp_path / "elsewhere/checkpoint-6", [1, 2], [3, 3])
    rows = results.gather(work_dir, [tmp_path / "elsewhere"])
    assert [(row.table, row.n) for row in rows[3:]] == [(results.OTHERS, 2)]


@pytest.mark.parametrize("content, why", [("{", "not JSON"), ("[]", "no JSON object"), ('{"all": {}}', "not a metrics.json"),
                                          ('{"all": {"model": {"n": 1, "Acc@1": {"value": NaN}}}}', "not a metrics.json")])
def test_a_damaged_file_hides_no_other(work_dir, caplog, content, why):
    (work_dir / "steps/worse/metrics.json").write_text(content)
    assert [row.name for row in results.gather(work_dir)] == ["main", "same"]
    assert "passed over" in caplog.text and why in caplog.text and "steps/worse/metrics.json" in caplog.text


def test_nothing_to_gather(tmp_path):
    with pytest.raises(UserError, match="run_experiment.py"):
        results.gather(tmp_path)
