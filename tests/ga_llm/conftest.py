"""What tests of evaluation share: prompts made by hand, and real NYC."""
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ga_llm.base import prompts
from ga_llm.pairs import spelling

ROOT = Path(__file__).parents[2]
NYC = Path(os.environ.get("GA_LLM_DATA", ROOT.parent / "shared/data")) / "nyc/raw"


@pytest.fixture(scope="session")
def make_prompt():
    """A TestPrompt in our wording from POI ids."""
    def make(pair, user, current, target, history=(), time="2012-04-03 18:00:09", fits=True):
        question = prompts.question(user, [], [f"POI id {i}." for i in history], [f"POI id {i}." for i in current],
                                    prompts.ask_poi(time, user, 0, 9))
        return from_line(pair, prompts.join(question, prompts.answer_poi(time, user, target)), fits)
    return make


@pytest.fixture(scope="session")
def foreign_prompt():
    """One in another wording, that names neither user nor time: at POI 4, asked for 6."""
    return from_line(0, "<question>: was at POI id 4 <answer>: goes to POI id 6")


@pytest.fixture(scope="session")
def nyc(tmp_path_factory):
    """Real NYC through run.py and process_llm_gps.py: (its folder, its test prompts, untokenized)."""
    if not NYC.is_dir():
        pytest.skip("the real NYC check-ins are not here")
    root = tmp_path_factory.mktemp("nyc")
    raw = root / "data-preprocess/data/nyc/raw"
    raw.parent.mkdir(parents=True)
    raw.symlink_to(NYC)
    (root / "best_conf").symlink_to(ROOT / "best_conf")
    for command in (["run.py", "-f", "best_conf/nyc.yml"],
                    ["process_llm_gps.py", "-dataset_name", "nyc", "-fields", "poi"]):
        subprocess.run([sys.executable, ROOT / "data-preprocess" / command[0], *command[1:]], cwd=root, check=True)
    folder = root / "datasets/nyc/preprocessed"
    lines = (folder / "test_qa_pairs_kqt_200items_nyc_llm_without_sim_gps.txt").read_text().splitlines()
    return folder, spelling.untokenized(lines)


def from_line(pair, line, fits=True):
    start, target, _ = spelling.answer_id(line)
    return spelling.TestPrompt(pair, line[:start], target, [], 0, fits)


@pytest.fixture(scope="session")
def asked_city(once):
    """A small synthetic city's folder: D/<kind> holds its question files, mapping and samples, `kind` being how its
    check-ins are shown: "tokens" (<TIME n><GPS n>, answered by <GPS n>), "names" (the category behind), "moments"
    (answered by ids), "text"."""
    kinds = {"tokens": ["-fields", "moment,gps", "-answer", "token"], "moments": ["-fields", "moment,gps"],
             "names": ["-fields", "moment,gps,category", "-answer", "token"],
             "text": ["-fields", "clock,poi,gps"]}

    def make(folder):
        (folder / "best_conf").symlink_to(ROOT / "best_conf")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)

            def script(name, *flags):
                patch.setattr(sys, "argv", [name, *flags])
                runpy.run_path(str(ROOT / "data-preprocess" / name), run_name="__main__")

            script("make_sample_raw.py", "-users", "8", "-days", "40", "-pois", "50")
            script("run.py", "-f", "best_conf/sample.yml")
            for kind, flags in kinds.items():
                script("process_llm_gps.py", "-dataset_name", "sample", "-max_history", "12", "-validate", "True",
                       *flags)
                shutil.copytree("datasets/sample/preprocessed", kind)

    return once("asked_city", make)
