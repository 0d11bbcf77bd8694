"""results.py's tables, on made-up metrics.json files whose figures are known."""
import csv
import io
import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from harness import call, refusal

from ga_llm.base.cli import UserError
from ga_llm.evaluation import comparison
from ga_llm.tables import pages, results

ROOT = Path(__file__).parents[3]
SECRET = "somebodys-machine"        # the folder of base model and host: for nobody else's eyes

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
        "all": found, "fits": found, "settings": {"base_model": f"/{SECRET}/model"},
        "git": {"commit": "0123456789" * 4, "dirty": True},
        "groups": {"user activity": {"inactive": {"model": summary(ranks[:10]),
                                                  "user-history frequency": summary(baseline[:10])}}},
        "protocol": "ga-llm", "decoding": "rank", "date": "2026-11-24",
        "command": f"python test_next_gps.py --base_model /{SECRET}/model",
        "machine": {"cpu": "a processor", "cores": 2, "gpus": []}}))
    with (folder / "predictions.jsonl").open("w") as file:
        for pair, rank in enumerate(ranks):
            record = {"pair": pair, "user": pair % 7, "time": "2012-01-01 00:00:00", "target": 5, "fits": True,
                      "rank": rank, "top": [[5 if rank == 1 else 6, -0.1]], "km": 1.0}
            file.write(json.dumps(record) + "\n")


def link(work_dir, name, folder, **about):
    path = work_dir / "cpu" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"experiment": name, "scale": "cpu", "table": "modules", "row": name, "model": "tiny",
                                "metrics": f"steps/{folder}/metrics.json", "command": f"python run {name}", **about}))


def step(work_dir, name, kind, seconds, before=(), log=None):
    """step.json of a step that is done, and the log of its training."""
    out = work_dir / "steps" / name / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out.parent / "step.json").write_text(json.dumps({
        "step": kind, "key": "0", "seconds": seconds, "steps": list(before), "inputs": {f"/{SECRET}/raw.csv": "0"},
        "machine": f"{SECRET}: a processor, 2 cores", "command": f"python x.py /{SECRET}/a"}))
    if log:
        lines = (json.dumps({"step": number, "loss": 1.0, "elapsed_seconds": elapsed}) for number, elapsed in log)
        (out / "trainer_log.jsonl").write_text("".join(line + "\n" for line in lines))


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
    text = pages.markdown(list(rows.values()))
    main = next(line for line in text.splitlines() if line.startswith("| main"))
    assert main == "| main | 100 | .6000 [.5000, .7000] | 1.0000 | .8000 | – | (1) |"
    assert text.count("| user-history frequency | 100 |") == 1
    assert re.search(r"\| -\.4000 \[-\.\d{4}, -\.\d{4}\], p < \.001: worse \|", text)
    assert "not verified here" in text and "| main | .3988 (.6000) | GA-LLM |" in text
    assert "1. main: tiny; protocol ga-llm, decoding rank; 2026-11-24; a processor, 2 cores" in text
    assert "code 0123456 and changes; `python run worse`" in text and "reference: main" in text


def test_a_reference_of_another_table_is_shown(work_dir):
    link(work_dir, "main", "main", table="main results")
    text = pages.markdown(results.gather(work_dir)).partition("### modules")[2]
    assert "| main (reference) | 100 | .6000 [.5000, .7000] | 1.0000 | .8000 | – | see main results |" in text
    assert text.count("(reference)") == 1 and "| worse | 100 |" in text


def test_csv_holds_the_same(work_dir):
    found = list(csv.DictReader(io.StringIO(pages.table(results.gather(work_dir)))))
    main = next(row for row in found if row["row"] == "main")
    assert (main["Acc@1 published"], main["Acc@1 ours"], main["n"]) == ("0.3988", "0.6", "100")
    assert float(main["user-history frequency MRR"]) == pytest.approx(1 / 3) and main["reference"] == ""
    assert [row["Acc@1 verdict"] for row in found] == ["", "within noise", "worse"]


def test_a_group_of_another_rows_pairs(work_dir):
    link(work_dir, "cold", "main", group=["user activity", "inactive"], reference="main")
    row = next(row for row in results.gather(work_dir) if row.name == "cold")
    assert row.n == 10 and row.found["model"]["Acc@1"]["value"] == 1.0 and row.differences is None


def test_distance_and_rare_targets_apart(work_dir):
    """By hand: of the 20 pairs whose target is rare, `main` ranks all first and `worse` a half; km as given."""
    for name, rare in (("main", [1] * 20), ("worse", [1] * 10 + [2] * 10), ("same", [1] * 20)):
        path = work_dir / "steps" / name / "metrics.json"
        report = json.loads(path.read_text())
        report["groups"] = {"target's check-ins in train": {"at most 2": {
            "model": summary(rare), "user-history frequency": summary([4] * 20)}}}
        report["all"]["model"] |= {"mean km": {"value": 2.5, "low": 2.0, "high": 3.0},
                                   "share within 1 km": {"value": 0.5, "low": 0.4, "high": 0.6}}
        path.write_text(json.dumps(report))
    text = pages.markdown(results.gather(work_dir))
    assert "| mean km [95 %] | within 1 km | target's check-ins in train: at most 2 (n = 20) |" in text
    assert "| main | 2.50 [2.00, 3.00] | .5000 | 1.0000 |" in text
    assert "| worse | 2.50 [2.00, 3.00] | .5000 | .7500 |" in text
    assert "| user-history frequency | – | – | .2500 |" in text


def test_files_of_no_experiment_stand_by_their_folder(work_dir, tmp_path):
    measured(tmp_path / "elsewhere/checkpoint-6", [1, 2], [3, 3])
    rows = results.gather(work_dir, [tmp_path / "elsewhere"])
    assert [(row.table, row.n) for row in rows[3:]] == [(results.OTHERS, 2)]


def test_a_file_that_tells_little_is_shown_with_what_it_tells(work_dir):
    path = work_dir / "steps/worse/metrics.json"
    path.write_text(json.dumps({"all": json.loads(path.read_text())["all"]}))
    rows = results.gather(work_dir)
    note = "3. worse: tiny; protocol –, decoding –; –; –; reference: main; `python run worse`"
    assert note in pages.markdown(rows).splitlines() and rows[2].groups == {} and rows[2].fits is None
    results.keep(rows, work_dir / "results")
    assert results.kept(work_dir / "results") == rows


@pytest.mark.parametrize("content, why", [
    ("{", "not JSON"), ("[]", "no JSON object"), ('{"all": {}}', "not a metrics.json"),
    ('{"all": {"model": {"n": 1, "Acc@1": {"value": NaN}}}}', "not a metrics.json"),
    ('{"all": {"model": {"n": 1, "Acc@1": {"value": 0, "low": 0, "high": 0}}}, "groups": [1]}', "groups")])
def test_a_damaged_file_hides_no_other(work_dir, caplog, content, why):
    (work_dir / "steps/worse/metrics.json").write_text(content)
    assert [row.name for row in results.gather(work_dir)] == ["main", "same"]
    assert "passed over" in caplog.text and why in caplog.text and "steps/worse/metrics.json" in caplog.text


@pytest.mark.parametrize("about", [{"group": ["user activity"]}, {"published": {"Acc@1": ".4"}}, {"table": None},
                                   {"scale": "../cpu"}, {"metrics": 5}], ids=lambda about: next(iter(about)))
def test_a_damaged_link_hides_no_other(work_dir, caplog, about):
    link(work_dir, "worse", "worse", **about)
    rows = results.gather(work_dir)
    assert [row.experiment for row in rows] == ["main", "same", None] and rows[2].table == results.OTHERS
    assert "cpu/worse.json" in caplog.text and "run its experiment again" in caplog.text


def test_nothing_to_gather(tmp_path):
    with pytest.raises(UserError, match="run_experiment.py"):
        results.gather(tmp_path)


def keep(work_dir):
    """The kept files of all rows, as the command writes them: {name: text}."""
    assert call(work_dir, "results.py", "--work_dir", work_dir, "--keep").code == 0
    return {path.name: path.read_text() for path in (work_dir / "results/cpu").iterdir()}


def test_kept_rows_are_the_rows_of_the_runs(work_dir):
    """Also a group's row, whose figures are those of the group alone; kept again, the bytes are the same."""
    link(work_dir, "cold", "main", group=["user activity", "inactive"], reference="main")
    first = keep(work_dir)
    (work_dir / "cpu/main.json").touch()
    assert keep(work_dir) == first and sorted(first) == ["cold.json", "main.json", "same.json", "worse.json"]
    rows = results.kept(work_dir / "results")
    assert rows == results.gather(work_dir)
    assert pages.markdown(rows) == pages.markdown(results.gather(work_dir))
    cold, worse = rows[0], rows[-1]
    assert cold.group == ["user activity", "inactive"] and cold.n == 10 and cold.groups == {}
    assert worse.differences["Acc@1"]["verdict"] == "worse"
    assert worse.groups["user activity"]["inactive"]["model"]["n"] == 10
    text = pages.markdown(rows)
    assert "| cold | 10 | 1.0000 [.9000, 1.1000] | 1.0000 | 1.0000 |" in text
    assert "cold: tiny; user activity: inactive;" in text


def test_kept_files_hold_nothing_of_machine_or_people(work_dir):
    model = f"/{SECRET}/Llama"
    link(work_dir, "main", "main", model=model, written="2026-11-24T00:00:00",
         command=f"python run_experiment.py x.yml --model {model} --a=../{SECRET}/b --b ~/{SECRET}/c")
    kept = keep(work_dir)
    values = json.loads(kept["main.json"])
    assert (values["model"], values["command"]) == ("Llama", "python run_experiment.py x.yml --model Llama --a=b --b c")
    nowhere = (SECRET, str(work_dir), socket.gethostname(), "settings", "written", "2012-01-01", '"user":', '"pair":',
               '"target":', '"time":', '"rank":', '"top":')
    for text in kept.values():
        assert [word for word in nowhere if word in text] == []
        assert not re.search(r'[" =]/', text) and json.loads(text).keys() == results.KEPT_FIELDS.keys()


def test_what_a_training_took(work_dir):
    """A step that two others build on counts once; a training's seconds are those of its log, of all its starts."""
    step(work_dir, "main", "test", 60.5, ["stage2-1", "samples-1"])
    step(work_dir, "stage2-1", "stage2", 100.5, ["samples-1"], log=[(10, 50.0), (800, 660.0)])
    step(work_dir, "samples-1", "samples", 19.5)
    link(work_dir, "main", "main", step="main")
    row = next(row for row in results.gather(work_dir) if row.name == "main")
    assert row.seconds == {"samples": 19.5, "stage2": 660, "test": 60.5}
    assert row.training == {"stage2": {"steps": 800, "seconds": 660}}
    assert "training 11.0 min (steps: stage2 800); all steps of its chain 12.3 min;" in pages.markdown([row])
    # A mean's chain has several trainings; and a log need not tell of the last step, which its checkpoint does. A step
    # is named once for each of its outputs that another takes.
    step(work_dir, "main", "test", 60.5, ["stage2-1", "stage2-2", "stage2-2", "samples-1"])
    step(work_dir, "stage2-2", "stage2", 240.0, ["samples-1"], log=[(800, 200.0)])
    for number in (400, 813):
        (work_dir / f"steps/stage2-2/out/checkpoint-{number}").mkdir()
    row = next(row for row in results.gather(work_dir) if row.name == "main")
    assert row.seconds == {"samples": 19.5, "stage2": 900, "test": 60.5}
    assert row.training == {"stage2": {"steps": 1613, "seconds": 900}}
    (work_dir / "steps/samples-1/step.json").unlink()
    row = next(row for row in results.gather(work_dir) if row.name == "main")
    assert row.seconds is None and row.training is None and row.n == 100


def test_prompts_that_do_not_fit_are_told(work_dir):
    path = work_dir / "steps/main/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fits": {"model": summary([1, 1, 2, 2])}}))
    text = pages.markdown(results.gather(work_dir))
    assert text.count("prompts fit") == 1 and "4 prompts fit --seq_len, Acc@1 .5000 [.4000, .6000]" in text


def test_pages_are_what_is_kept():
    rows = results.kept(ROOT / results.KEPT)
    for name, tables in (("README.md", pages.short(rows)), ("docs/tables.md", pages.markdown(rows))):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert pages.between_marks(text, tables, name) == text


def test_short_table_has_baselines_below_their_pairs(work_dir, monkeypatch):
    """Rows by scale, in the order of SHORT; a row that it does not name is left out."""
    monkeypatch.setattr(pages, "SHORT", ("worse", "main"))
    assert pages.short(results.gather(work_dir)).splitlines()[2:] == [
        "| worse | tiny | – | 100 | .2000 [.1000, .3000] | 1.0000 | .6000 |",
        "| main | tiny | – | 100 | .6000 [.5000, .7000] | 1.0000 | .8000 |",
        "| *user-history frequency* | – | – | 100 | .0000 [-0.1000, .1000] | 1.0000 | .3333 |"]
    monkeypatch.setattr(pages, "SHORT", ())
    assert pages.short(results.gather(work_dir)) == pages.NO_RESULT


@pytest.mark.parametrize("flag, first", [("--readme", "|  | model |"), ("--tables", "Every figure")])
def test_a_page_is_written_between_its_marks(work_dir, flag, first):
    """Without a result it says so; again, nothing changes; what stands around the marks stays."""
    page = work_dir / "page.md"
    page.write_text(f"# before\n{pages.BEGIN}\nold\n{pages.END}\nbehind é\n", encoding="utf-8")
    assert call(work_dir, "results.py", flag, "page.md").code == 0
    none = f"# before\n{pages.BEGIN}\n\nNo result is kept yet.\n\n{pages.END}\nbehind é\n"
    assert page.read_text(encoding="utf-8") == none
    link(work_dir, "main_nyc", "main")
    result = call(work_dir, "results.py", "--work_dir", work_dir, "--keep", flag, "page.md")
    assert result.code == 0 and "wrote page.md, of 4 rows" in result.out
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# before\n{pages.BEGIN}\n\n{first}") and text.endswith(f"{pages.END}\nbehind é\n")
    assert call(work_dir, "results.py", flag, "page.md").code == 0 and page.read_text(encoding="utf-8") == text
    page.write_text(f"{pages.END}\n{pages.BEGIN}\n")
    refusal(call(work_dir, "results.py", flag, "page.md"), "page.md", pages.BEGIN)
    refusal(call(work_dir, "results.py", flag, "none.md"), "none.md")


@pytest.mark.parametrize("change, names", [
    (None, ["not JSON"]), ({"found": {}}, ["found"]), ({"table": 1}, ["table"]), ({"user": 5}, ["user"]),
    ({"published": {"Acc@1": "high"}}, ["published"]), ({"experiment": "main"}, ["is about cpu/main"]),
    ({"scale": "../gpu"}, ["is about ../gpu/worse"]), ({"groups": {"a": {"b": 1}}}, ["groups"]),
    ({"differences": {"Acc@1": {"difference": 1}}}, ["differences"]), ({"training": {"gcim": 5}}, ["training"])],
    ids=["cut", "no figures", "type", "unknown", "published", "name", "scale", "groups", "differences", "training"])
def test_a_damaged_kept_file_is_named(work_dir, change, names):
    kept = keep(work_dir)["worse.json"]
    path = work_dir / "results/cpu/worse.json"
    path.write_text(kept[:-9] if change is None else json.dumps(json.loads(kept) | change))
    with pytest.raises(UserError, match=r"--keep`, or remove it") as refused:
        results.kept(work_dir / "results")
    assert str(refused.value).startswith(str(path)) and all(name in str(refused.value) for name in names)


def test_a_difference_to_another_reference_is_out_of_date(work_dir):
    kept = keep(work_dir)["main.json"]
    values = json.loads(kept)
    values["found"]["model"]["Acc@1"]["value"] = 0.61
    (work_dir / "results/cpu/main.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"same.json: its difference in Acc@1 is that of another main than .*main.json"):
        results.kept(work_dir / "results")


def test_nothing_to_keep(work_dir, tmp_path):
    measured(tmp_path / "elsewhere/a", [1, 2], [3, 3])
    result = call(work_dir, "results.py", "--work_dir", tmp_path / "elsewhere", "--keep")
    refusal(result, "run_experiment.py", "--work_dir")
    assert not (tmp_path / "results").exists()


@pytest.fixture
def of_seeds(work_dir):
    """`seeded`, three seeds whose Acc@1 is .5, .6, .7 and whose reference is `main` at two."""
    for name, seed, firsts in (("seeded", 1, 50), ("seeded", 2, 60), ("seeded", 3, 70), ("main", 1, 30),
                               ("main", 2, 40)):
        folder = f"{name}-{seed}"
        measured(work_dir / "steps" / folder, [1] * firsts + [2] * (100 - firsts), [3] * 100)
        link(work_dir, f"{name}.{seed}", folder, experiment=name, row=name, seed=seed, reference="main",
             command=f"python run_experiment.py {name}.yml --seeds {seed}")
    return work_dir


def test_rows_of_seeds_are_one(of_seeds):
    rows = {row.experiment: row for row in results.gather(of_seeds)}
    row = rows["seeded"]
    assert row.found["model"]["Acc@1"]["value"] == pytest.approx(.6) and row.n == 100
    assert {seed: found["Acc@1"] for seed, found in row.seeds.items()} == {"1": .5, "2": .6, "3": .7}
    assert row.command == "python run_experiment.py seeded.yml --seeds 1,2,3"
    group = row.groups["user activity"]["inactive"]["model"]
    assert group["n"] == 10 and group["Acc@1"]["value"] == 1
    expected = comparison.differences(*([of_seeds / f"steps/{name}-{seed}/predictions.jsonl" for seed in seeds]
                                        for name, seeds in (("main", (1, 2)), ("seeded", (1, 2, 3)))))["Acc@1"]
    assert {key: row.differences["Acc@1"][key] for key in expected} == expected
    assert expected["difference"] == pytest.approx(.25)
    assert rows["main"].found["model"]["Acc@1"]["value"] == pytest.approx(.35)      # not the row without a seed


def test_the_interval_of_seeds_is_wider_than_that_of_pairs(of_seeds):
    """Where the seeds differ more than pairs do; of equal runs it is that of pairs."""
    files = [of_seeds / f"steps/seeded-{seed}/predictions.jsonl" for seed in (1, 2, 3)]
    one, many = comparison.means(files[1:2])["Acc@1"], comparison.means(files)["Acc@1"]
    assert many["high"] - many["low"] > one["high"] - one["low"]
    assert comparison.means([files[1], files[1], files[1]])["Acc@1"] == pytest.approx(one)


def test_rows_of_seeds_are_kept_and_shown(of_seeds):
    keep(of_seeds)
    rows = results.kept(of_seeds / "results")
    assert rows == results.gather(of_seeds)
    text = pages.markdown(rows)
    assert "| seeded, mean of 3 seeds | 100 | .6000 [" in text
    assert "seed 1 .5000 / 1.0000 / .7500; seed 2 .6000 / 1.0000 / .8000" in text


def test_seeds_of_other_pairs_are_passed_over(of_seeds, caplog):
    path = of_seeds / "steps/seeded-2/predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    rows = results.gather(of_seeds)
    assert "seeded" not in {row.experiment for row in rows} and "has no pair 99" in caplog.text
