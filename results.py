"""All results as one table, the published figures beside ours: results.md and results.csv.

    python results.py
    python results.py --work_dir runs/experiments --out results

Rows of experiments stand in their tables; every other metrics.json below --work_dir and --others is named by its folder.
Each with n, 95 % interval, baselines on the same pairs, protocol, decoding, date, command, machine, and with the
difference to the table's reference row, which may be within noise.
"""
from pathlib import Path

from ga_llm import results, writing
from ga_llm.cli import Parser, run


def main():
    parser = Parser(__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/experiments"), help="default: %(default)s")
    parser.add_argument("--others", type=Path, nargs="*", default=[Path("runs"), Path("outputs")],
                        help="where other metrics.json may lie (default: runs outputs)")
    parser.add_argument("--out", default="results", help="the files' name, without .md and .csv (default: %(default)s)")
    args = parser.parse_args()
    rows = results.gather(args.work_dir, args.others)
    text = results.markdown(rows)
    with writing.together() as new_file:
        for ending, content in ((".md", text + "\n"), (".csv", results.table(rows))):
            with new_file(args.out + ending) as file:
                file.write(content)
    print(text)
    print(f"wrote {args.out}.md and {args.out}.csv, {len(rows)} rows")


if __name__ == "__main__":
    run(main)
