"""All results as tables, baselines and published figures beside ours.

    python results.py                           # of what was run here: runs/results.md and runs/results.csv
    python results.py --keep                    # put the rows of experiments into results/, to be committed
    python results.py --readme README.md --tables docs/tables.md    # write the pages' tables, from results/ alone

Rows of experiments stand in their tables. Without --keep, --readme and --tables, every other metrics.json below
--work_dir and --others is named by its folder. Each row has n, 95 % interval, baselines on the same pairs, protocol,
decoding, date, command, hardware, and the difference to the table's reference row, which may be within noise. A row is
kept as results/<scale>/<experiment>.json: figures, and nothing about a single test pair.
"""
from pathlib import Path

from ga_llm.base import writing
from ga_llm.base.cli import Parser, UserError, run
from ga_llm.tables import pages, results


def main():
    parser = Parser(__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/experiments"), help="default: %(default)s")
    parser.add_argument("--others", type=Path, nargs="*", default=[Path("runs"), Path("outputs")],
                        help="where other metrics.json may lie (default: runs outputs)")
    parser.add_argument("--out", default="runs/results",
                        help="the files' name, without .md and .csv (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the rows of --work_dir in --kept")
    parser.add_argument("--readme", type=Path, help="the page whose short table to write anew, from --kept")
    parser.add_argument("--tables", type=Path, help="the page whose tables to write anew, from --kept")
    parser.add_argument("--kept", type=Path, default=results.KEPT, help="where results are kept (default: %(default)s)")
    args = parser.parse_args()
    if args.keep:
        for path in results.keep(results.gather(args.work_dir), args.kept):
            print(f"wrote {path}")
    to_write = {args.readme: pages.short, args.tables: pages.markdown}
    to_write.pop(None, None)
    if to_write:
        rows = results.kept(args.kept)
        for path, made in to_write.items():
            write_page(path, made(rows))
            print(f"wrote {path}, of {len(rows)} rows")
    if args.keep or to_write:
        return
    rows = results.gather(args.work_dir, args.others)
    text = "# Results\n\n" + pages.markdown(rows) + "\n"
    with writing.together() as new_file:
        for ending, content in ((".md", text), (".csv", pages.table(rows))):
            with new_file(args.out + ending) as file:
                file.write(content)
    print(text)
    print(f"wrote {args.out}.md and {args.out}.csv, {len(rows)} rows")


def write_page(path: Path, tables: str) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text in UTF-8; give README.md or docs/tables.md") from None
    written = pages.between_marks(text, tables, str(path))
    with writing.atomic_write(path) as file:
        file.write(written)


if __name__ == "__main__":
    run(main)
