"""The project's own scripts, started as a user starts them, in a folder of their own."""
import itertools
import os
import subprocess
import sys
from pathlib import Path

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from make_tiny_llama import make_tiny_llama

ROOT = Path(__file__).resolve().parents[2]


class Chain:
    """Scripts run in `folder`, which sees the repository's best_conf/ and ds_configs/."""

    def __init__(self, folder: Path, device: str):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("best_conf", "ds_configs"):
            if not (self.folder / name).exists():
                (self.folder / name).symlink_to(ROOT / name)
        self.environment = dict(os.environ)
        if device == "cpu":
            self.environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}

    def new_runs(self) -> Path:
        """A folder that is not there yet, for what the scripts train."""
        number = next(number for number in itertools.count(1) if not (self.folder / f"runs{number}").exists())
        return self.folder / f"runs{number}"

    def launch(self, script: str, *flags, launcher=(sys.executable,)) -> subprocess.Popen:
        """The started script; what it prints goes to <folder>/<script>.log."""
        command = [*map(str, launcher), str(ROOT / script), *map(str, flags)]
        with self.log(script).open("a") as log:
            return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)

    def start(self, script: str, *flags, **options) -> None:
        """Run a script to its end. Raises UserError with its last line if it fails."""
        self.check(script, self.launch(script, *flags, **options).wait())

    def check(self, script: str, code: int) -> None:
        if code:
            lines = self.log(script).read_text().splitlines() or ["no output"]
            raise UserError(f"{script}: exit code {code}, {lines[-1]} (all of it: {self.log(script)})")

    def log(self, script: str) -> Path:
        return self.folder / f"{Path(script).stem}.log"

    def sample_city(self) -> None:
        """The synthetic city, from raw check-ins to stage 1's and stage 2's questions."""
        data = artifacts.preprocessed("sample", self.folder / "datasets")
        if not (data / artifacts.questions("test", "sample", 2, False)).exists():
            self.start("data-preprocess/make_sample_raw.py", "-users", 30, "-days", 60)
            self.start("data-preprocess/run.py", "-f", "best_conf/sample.yml")
            self.questions("sample", *[["-max_history", 10]] * 2)

    def samples(self, dataset: str) -> None:
        """The samples of a data set whose raw files lie in the repository. Raises UserError where they do not."""
        raw = ROOT / "data-preprocess/data" / dataset
        if not raw.is_dir():
            raise UserError(f"{raw}: not found; put the raw files of {dataset} there, as docs/recipe.md says")
        link = self.folder / "data-preprocess/data" / dataset
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(raw)
        if not (artifacts.preprocessed(dataset, self.folder / "datasets") / artifacts.STATS).exists():
            self.start("data-preprocess/run.py", "-f", f"best_conf/{dataset}.yml")

    def questions(self, dataset: str, stage_1: list, stage_2: list) -> None:
        """Samples to the questions of both stages, with their flags."""
        for script, flags in (("process_projector_gps_stage1.py", stage_1), ("process_llm_gps.py", stage_2)):
            self.start(f"data-preprocess/{script}", "-dataset_name", dataset, "-use_sim", False, *flags)

    def tiny_llama(self) -> Path:
        folder = self.folder / "models/tiny"
        if not folder.exists():
            make_tiny_llama(folder, hidden=64, layers=2, heads=4)
        return folder
