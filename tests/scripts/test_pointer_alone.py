"""The pointer alone beside an evaluation, and trained by tools/baselines.py for samples that are there."""
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from commands import CODE, DATA
from forked import evaluate
from harness import call, snapshot
from report_folder import write

from ga_llm.base import artifacts
from ga_llm.evaluation import pointer_alone
from ga_llm.pairs import sft_data, spelling
from ga_llm.report import contents, explorer
from geo_encoder.gps_tokens import read_gps_mapping

OUTPUT = "outputs/llm/checkpoint-6"


@pytest.fixture
def told(repo):
    """The file as if the pointer had been right of every second pair, and second of the others."""
    folder = repo / DATA
    lines = sft_data.read_test_pairs(folder / artifacts.questions("test", "sample", 2, use_sim=False), "…")
    path = pointer_alone.write(folder, [
        {"user": prompt.user, "time": prompt.time, "target": prompt.target, "rank": 1 + prompt.pair % 2,
         "top": [[prompt.target, -0.1]]} for prompt in spelling.untokenized(lines)])
    yield path
    path.unlink()


def test_every_evaluation_shows_it(repo, told):
    result, metrics = evaluate(repo, OUTPUT, "--draw", "5", "--protocol", "sthgcn")
    pairs = [json.loads(line)["pair"] for line in (repo / OUTPUT / "sthgcn_draw5/predictions.jsonl").open()]
    found = metrics["all"][pointer_alone.NAME]
    assert found["n"] == metrics["n"] == len(pairs) == 5
    assert found["Acc@1"]["value"] == sum(pair % 2 == 0 for pair in pairs) / 5 and found["Acc@5"]["value"] == 1
    assert metrics["against"][pointer_alone.NAME]["Acc@1"]["b"] == metrics["all"]["model"]["Acc@1"]["value"]
    assert f"\nAcc@1  {pointer_alone.NAME}  " in result.out


def test_one_of_another_split_is_named_and_not_shown(repo, told):
    told.write_text(json.dumps(json.loads(told.read_text()) | {"train": "0" * 64}))
    result, metrics = evaluate(repo, OUTPUT, "--limit", "2")
    assert pointer_alone.NAME not in metrics["all"] and pointer_alone.NAME not in result.out
    assert f"{DATA}/pointer_alone.json: of another train split than" in result.err


def test_the_report_and_the_explorer_show_it(tmp_path, no_pictures):
    checkpoint = write(tmp_path, encoder=False, pointer=True)
    result = call(tmp_path, "report.py", "--output_dir", checkpoint)
    assert result.code == 0, result.err
    page = (checkpoint / "report/report.html").read_text()
    assert "The pointer alone, without an LLM, reaches 0.0000 [" in page
    assert "The model is better than the pointer alone: Acc@1 differs by +0.5000 [" in page
    evaluation = contents.read_evaluation(checkpoint)
    folder = contents.data_folder(evaluation)
    mapping = read_gps_mapping(folder / artifacts.gps_mapping("town"))
    baseline = contents.read_baseline(evaluation, folder, mapping, False)

    def shown():
        return {one["name"]: one for one in explorer.gather([evaluation], mapping, baseline, folder)["baselines"]}

    assert shown()[pointer_alone.NAME]["rank"] == [2] * len(evaluation.records)
    del evaluation.metrics["all"][pointer_alone.NAME]       # trained since
    assert pointer_alone.NAME not in shown() and len(shown()) == 3


@pytest.mark.slow
def test_it_is_trained_once_and_says_what_its_model_says(repo, tmp_path, steps_are_forked, caplog):
    """A short one, for a copy of the samples by another name: the user's own files stay as they are."""
    scale = yaml.safe_load((repo / "experiments/scales/cpu_pointer_alone.yml").read_text())
    scale["model"][scale["model"].index("128")] = "32"
    scale |= {"training": {"max_steps": 4, "save_steps": 4}, "questions": {"thinned": 1}}
    for name in CODE:
        if name in ("experiments", "best_conf"):
            shutil.copytree(repo / name, tmp_path / name)
        else:
            (tmp_path / name).symlink_to(repo / name)
    (tmp_path / "experiments/scales/cpu_pointer_alone.yml").write_text(yaml.safe_dump(scale))
    conf = (repo / "best_conf/sample.yml").read_text().replace("dataset_name: sample", "dataset_name: town")
    (tmp_path / "best_conf/town.yml").write_text(conf)
    folder = tmp_path / "mine/town/preprocessed"
    folder.mkdir(parents=True)
    for path in filter(Path.is_file, (repo / DATA).iterdir()):
        shutil.copy(path, folder / path.name.replace("sample_gps", "town_gps").replace("_sample_llm", "_town_llm"))
    before = snapshot(folder)

    printed = []
    caplog.set_level("INFO")
    for done in (5, 0):
        caplog.clear()
        result = call(tmp_path, "tools/baselines.py", "-dataset_name", "town", "-data_path", "mine", "-pointer", "True")
        assert result.code == 0 and caplog.text.count("done in") == done, result.err
        printed.append(result.out)
    assert printed[0] == printed[1] and printed[0].count(f"\n{pointer_alone.NAME} ") == 9
    assert {name: content for name, content in snapshot(folder).items() if name != "pointer_alone.json"} == before

    held = json.loads((folder / "pointer_alone.json").read_text())
    records = [json.loads(line) for file in (tmp_path / "runs/baselines/steps").rglob("predictions.jsonl")
               for line in file.open()]
    asked = [pd.read_csv(folder / f"{split}_sample.csv")["TrajectoryId"].nunique() for split in ("test", "validate")]
    assert len(records) == sum(asked) > max(asked) and held["seconds"]["stage2"] > 0
    said = {(record["user"], record["time"], record["target"]): (record["rank"], record["top"][0][0])
            for record in records}
    assert said == {tuple(key): (rank, guess) for *key, rank, guess in zip(*(held[name] for name in (
        "user", "time", "target", "rank", "guess")))}
