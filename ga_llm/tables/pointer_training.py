"""The pointer alone, trained for a preprocessed data set: from its samples on, the chain of a row of the tables.

Any data set will do whose samples run.py has written. Nothing is written there but what it says of the test and
validation pairs (`evaluation.pointer_alone`); the steps lie in folders of their own, and are not run twice.
"""
import dataclasses
import logging
from pathlib import Path

from ga_llm.base import artifacts
from ga_llm.base.reading import read_json
from ga_llm.evaluation import comparison, pointer_alone
from ga_llm.evaluation.baselines import MADE_BY
from ga_llm.tables import chain, experiments

log = logging.getLogger(__name__)

SCALE, ROW = "cpu_pointer_alone", "pointer_nyc"
WORK_DIR = Path("runs/baselines")


def train(folder: Path, work_dir: Path | str = WORK_DIR) -> Path:
    """Train and test what is not yet, and write the file. folder: <root>/<data set>/preprocessed.

    Raises UserError if samples are missing, or a step fails.
    """
    tests = steps(folder, work_dir)
    for step in {step.id: step for test in tests.values() for step in chain.in_order(test)}.values():
        step.run()
    files = [test.out / experiments.CHECKPOINT / artifacts.results({"split": split}) / artifacts.PREDICTIONS
             for split, test in tests.items()]
    records = [record for path in files for record in comparison.read(path).values()]
    took = {step.name: read_json(step.folder / chain.DONE)["seconds"] for step in chain.in_order(tests["test"])}
    path = pointer_alone.write(folder, records, scale=SCALE, seconds=took)
    log.info("%s: %d pairs; %s was trained in %.0f s, with questions and test %.0f s", path, len(records),
             pointer_alone.NAME, took["stage2"], sum(took.values()))
    return path


def steps(folder: Path, work_dir: Path | str) -> dict[str, chain.Step]:
    """{split: its evaluation}, of each that has check-ins, at the end of one chain."""
    name, scale = folder.parent.name, experiments.read_scale(SCALE)
    splits = ["test", *["validate"] * _has_check_ins(folder / artifacts.split_sample("validate"))]
    needed = [*map(artifacts.split_sample, ("train", *splits)), artifacts.gps_mapping(name)]
    samples = chain.Given("samples", (f"{name}/{folder.name}",), Path(work_dir) / "steps",
                          reads=tuple(artifacts.require(folder / file, MADE_BY) for file in needed))
    row = experiments.read(experiments.FOLDER / f"{ROW}.yml")
    row = dataclasses.replace(row, dataset=name, sections={**row.sections, "questions": {
        "validate": "validate" in splits}})
    test = experiments.chain_of(row, scale, None, work_dir, samples=samples)
    asked = {split: artifacts.questions(split, name, 2, use_sim=False) for split in splits}
    return {split: dataclasses.replace(test, command=tuple(asked[split] if part == asked["test"] else part
                                                           for part in test.command)) for split in splits}


def _has_check_ins(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return sum(1 for _, _ in zip(file, range(2))) == 2
