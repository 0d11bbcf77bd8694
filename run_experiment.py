"""Run rows of the paper's tables, each as a chain from raw check-ins to metrics.

    python run_experiment.py experiments/pointer_nyc.yml [more.yml …] --scale cpu_pointer_short
    python run_experiment.py experiments/main_nyc.yml --scale gpu --model M --plan

A step that is done is not run again, by whichever row; changed inputs are other steps; what was stopped goes on.
`--plan` prints the commands and runs nothing. `python results.py` makes the table.
"""
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "data-preprocess"))    # as for the scripts there

from checkins import config, files  # noqa: E402
from ga_llm.base import artifacts  # noqa: E402
from ga_llm.base.cli import Parser, listed, run, whole_number  # noqa: E402
from ga_llm.tables import chain, experiments  # noqa: E402

log = logging.getLogger("experiment")
WORK_DIR = Path("runs/experiments")


def main():
    parser = Parser(__doc__)
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT.yml", help=f"files of {experiments.FOLDER}/")
    parser.add_argument("--scale", default="gpu", help=f"a file of {experiments.SCALES}/ (default: %(default)s)")
    parser.add_argument("--model", help="folder of the base LLM, instead of the scale's")
    parser.add_argument("--seeds", type=listed(whole_number(0, 2**32 - 1)),
                        help="1,2,3: run each row, but for means, with each of these instead of its own seed")
    parser.add_argument("--work_dir", type=Path, default=WORK_DIR, help="default: %(default)s")
    parser.add_argument("--plan", action="store_true", help="print the steps and their commands, and run nothing")
    args = parser.parse_args()
    scale = experiments.read_scale(args.scale)
    rows = [experiments.read(path) for path in args.experiments]
    if args.seeds:      # a mean is of the seeds that it names itself
        rows = [one for row in rows for one in ([row] if row.is_mean else map(row.at, args.seeds))]
    tests = [experiments.chain_of(row, scale, raw_files, args.work_dir, args.model) for row in rows]

    if args.plan:
        steps = {step.id: step for test in tests for step in chain.in_order(test)}
        done = sum(step.done for step in steps.values())
        return print(chain.plan(steps.values()) + f"\n\n# {len(steps)} steps, {done} of them done")
    for number, (row, test) in enumerate(zip(rows, tests), start=1):
        log.info("%d of %d: %s, %s, %s", number, len(rows), row.name, row.table, row.row)
        for step in chain.in_order(test):
            step.run()
        log.info("%s: %s", row.name, experiments.write_link(row, scale, test, args.work_dir, args.model))


def raw_files(dataset: str) -> tuple[list[Path], list[str] | None]:
    """The raw files of a data set, and the command that must join them first (ca), if it must.

    Raises UserError, with the way out, if one is missing.
    """
    conf = config.load(artifacts.config_file(dataset))
    given, first = dict(conf.raw), None
    if conf.format == "gowalla":
        joined = given.pop("check_ins")
        if Path(joined).exists() and not all(Path(path).exists() for path in given.values()):
            given = {"check_ins": joined}       # it has come alone
        else:
            first = ["data-preprocess/generate_ca_raw.py"]
    return [files.find(path, conf.raw_from, conf.format != "csv") for path in given.values()], first


if __name__ == "__main__":
    run(main)
