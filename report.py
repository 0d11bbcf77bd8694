"""A report on an output folder: report.html and explorer.html, which load nothing and open offline, and pictures.

    python report.py --output_dir O/checkpoint-N [--geoencoder_path O1/N/geo_encoder_merged.pth] [--report_dir DIR]
    python report.py --output_dir O/checkpoint-N --against O2/checkpoint-M

Reads what test_next_gps.py wrote there (metrics.json, predictions.jsonl), the data set's files that it names, the logs
of the trainings and the geo-encoder: metrics with intervals and baselines, accuracy by group, calibration, an error
map, examples, what the encoder's vectors know of distance, losses. The explorer has every test pair on a map, and with
--against those of two runs side by side. What is not there is named in them, in a line.
"""
import argparse
import functools
import logging
from pathlib import Path

from ga_llm.base import artifacts, writing
from ga_llm.base.artifacts import GCIM, require
from ga_llm.base.cli import Parser, run
from ga_llm.evaluation import comparison
from ga_llm.report import contents, encoder_views, explorer, markup, page
from geo_encoder.gps_tokens import MADE_BY

log = logging.getLogger("report")


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help=f"the folder where `{comparison.MADE_BY}` has "
                        f"left {artifacts.METRICS}")
    parser.add_argument("--report_dir", type=Path, help="default: the folder report in --output_dir")
    parser.add_argument("--data_path", help="the root of the data sets' files (default: that of the test)")
    parser.add_argument("--gps_mapping_path", help="default: that of the test")
    parser.add_argument("--geoencoder_path", help="default: that of the test")
    parser.add_argument("--against", type=Path, help="another tested folder, of the same pairs, for the explorer")
    parser.add_argument("--shapes", type=Path, help="a GeoJSON of coasts or districts for the explorer's map (default: "
                        "the states that the data set's configuration names)")
    args = parser.parse_args()
    args.report_dir = args.report_dir or args.output_dir / "report"
    for path, made_by in ((args.geoencoder_path, GCIM.made_by), (args.gps_mapping_path, MADE_BY)):
        if path:
            require(path, made_by)
    return args


def main():
    args = arguments()
    evaluation = contents.read_evaluation(args.output_dir)
    with writing.alone(args.report_dir):
        made, pages, lacking = make(args, evaluation)
        with writing.together() as new_file:
            for name, png in made.pictures.items():
                with new_file(args.report_dir / name, "wb") as file:
                    file.write(png)
            for name, text in pages.items():
                with new_file(args.report_dir / name) as file:
                    file.write(text)
        kept = {args.report_dir / name for name in (*made.pictures, *pages)}
        for left in {*args.report_dir.glob(artifacts.REPORT_PICTURES), args.report_dir / artifacts.EXPLORER} - kept:
            left.unlink(missing_ok=True)        # of an earlier report that showed more
    print(f"wrote {args.report_dir / artifacts.REPORT} and {len(made.pictures)} pictures beside it")
    print(f"wrote {args.report_dir / artifacts.EXPLORER}" if lacking is None else f"no {artifacts.EXPLORER}: {lacking}")


def make(args, evaluation: contents.Evaluation) -> tuple[markup.Page, dict[str, str], contents.Absent | None]:
    """The report, whose pictures are to be written; {file name: HTML}; and why there is no explorer among these."""
    folder, other_data = contents.data_folder(evaluation, args.data_path), bool(args.data_path)
    # Each is read once, and only by the sections that need it.
    mapping = remembered(lambda: contents.read_mapping(evaluation, folder, args.gps_mapping_path, other_data))
    baseline = remembered(lambda: contents.read_baseline(evaluation, folder, mapping(), other_data))
    encoder = remembered(lambda: encoder_views.read_encoder(evaluation, mapping(), args.geoencoder_path))
    try:
        pages, lacking = {artifacts.EXPLORER: explore(args, evaluation, mapping(), baseline, folder)}, None
    except contents.Absent as absent:
        pages, lacking = {}, absent
    made = page.build(evaluation, mapping, baseline, encoder,
                      lambda: contents.read_losses(evaluation, args.geoencoder_path), folder)
    return made, {artifacts.REPORT: made.html(), **pages}, lacking


def explore(args, evaluation: contents.Evaluation, mapping, baseline, folder: Path) -> str:
    """The explorer's HTML. baseline: gives what `contents.read_baseline` reads, or raises Absent."""
    runs, lines = [evaluation], []
    if args.against:
        runs.append(explorer.align(contents.read_evaluation(args.against, "--against"), evaluation))
    try:
        known = baseline()
    except contents.Absent as absent:
        known, lines = None, [f"Without users' histories, groups and baselines: {absent}."]
    shapes = explorer.read_shapes(evaluation.settings["dataset_name"], args.shapes)
    return explorer.page(explorer.gather(runs, mapping, known, folder, shapes, lines))


def remembered(read):
    """`read`, which is called once; if it says that something is absent, it says so again."""
    @functools.cache
    def outcome():
        try:
            return read(), None
        except contents.Absent as absent:
            return None, absent

    def again():
        found, absent = outcome()
        if absent is not None:
            raise absent
        return found
    return again


if __name__ == "__main__":
    run(main)
