"""A copy of the repository in which every step has been run, shared by all tests of the scripts."""
import shutil
import sys

import pytest
from commands import CODE, ROOT, run, stage_1, stage_2


@pytest.fixture(scope="session")
def repo(tmp_path_factory):
    """A copy of the code, then every step up to a trained stage 2."""
    repo = tmp_path_factory.mktemp("repo")
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, repo / name, **({"ignore": shutil.ignore_patterns("data", "__pycache__")}
                                          if copy is shutil.copytree else {}))
    for command in (["data-preprocess/make_sample_raw.py", "-users", "30", "-days", "60"],
                    ["data-preprocess/run.py", "-f", "best_conf/sample.yml"],
                    ["data-preprocess/traj_qk.py", "-dataset_name", "sample"],
                    ["data-preprocess/process_projector_gps_stage1.py", "-dataset_name", "sample", "-use_sim", "False"],
                    ["data-preprocess/process_llm_gps.py", "-dataset_name", "sample", "-use_sim", "False",
                     "-max_history", "10"],
                    ["tools/make_tiny_llama.py", "--output_dir", "models/tiny", "--hidden", "32", "--kv_heads", "2"]):
        run(repo, sys.executable, *command)
    stage_1(repo, "outputs/gcim")
    stage_2(repo, "outputs/llm")
    return repo
