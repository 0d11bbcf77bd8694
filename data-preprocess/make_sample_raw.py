"""A synthetic city in any of the three raw formats: for the demo, for tests, and to measure scale.

    python data-preprocess/make_sample_raw.py                                     # the demo's city, TKY format
    python data-preprocess/make_sample_raw.py -format ca -users 2000 -days 90     # Gowalla's three files
    python data-preprocess/make_sample_raw.py -format tky -dataset_name tky -users 100000

Files go to data-preprocess/data/<dataset_name>/raw; dataset_name is `sample` for the TKY format and the format's own
name otherwise. The same flags and seed give the same bytes. A file that is there with other contents is never
replaced unless asked (-overwrite True), so real check-ins are safe.

The people: everyone has a home, a work place, lunch places near work and hobbies on weekdays of their own; some have a
station, a coffee place, shops and outings at weekends; each at an hour of their own. They check in at a part of these,
for a few days at a time, then pause for more than a day, which ends a trajectory. Now and then they explore: a short
hop from where they were, to a place that is popular there and open. So the next place depends on the user, on the hour
and the weekday, and on where the user is; a count of the user's places alone says little.

What is synthetic: nothing here is fitted to real check-ins, and accuracy on this city says nothing about real ones.
Clocks do not change for daylight saving.
"""
import logging
from pathlib import Path

import numpy as np

from checkins.wording import short
from ga_llm.base import artifacts, cli, writing
from ga_llm.base.cli import UserError
from synthetic.city import FORMATS, City
from synthetic.people import generate
from synthetic.raw_files import WRITERS, write_files

log = logging.getLogger("make_sample_raw")

DATA = Path("data-preprocess/data")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("-format", choices=tuple(FORMATS), default="tky")
    parser.add_argument("-dataset_name", help="folder under data-preprocess/data; default: see above")
    parser.add_argument("-out", type=Path, help="write to this folder instead")
    parser.add_argument("-users", type=int, default=100)
    parser.add_argument("-days", type=int, default=90)
    parser.add_argument("-pois", type=int, help="places; default: 4 for each user")
    parser.add_argument("-seed", type=int, default=0)
    parser.add_argument("-overwrite", type=cli.boolean, default=False, help="replace files with other contents")
    args = parser.parse_args()

    pois = max(200, 4 * args.users) if args.pois is None else args.pois
    for flag, value, least, most in (("-users", args.users, 1, 10 ** 7), ("-days", args.days, 1, 36500),
                                     ("-pois", pois, 50, 10 ** 8), ("-seed", args.seed, 0, 2 ** 63)):
        if not least <= value <= most:
            raise UserError(f"{flag} {short(value)}: too small or large; give {least} to {most}")
    dataset = args.dataset_name
    if dataset is None:
        dataset = "sample" if args.format == "tky" else args.format
    artifacts.dataset_name(dataset)
    folder = args.out or DATA / dataset / "raw"
    city = City(FORMATS[args.format], pois, args.seed)
    log.info("generating %d users for %d days", args.users, args.days)
    check_ins = generate(city, args.users, args.days, args.seed)
    if not len(check_ins.user):
        raise UserError(f"-users {args.users} -days {args.days}: nobody checked in; ask for more of either")
    with writing.alone(folder):
        write_files({folder / name: contents for name, contents in
                     WRITERS[args.format](city, check_ins, dataset).items()}, args.overwrite)
    log.info("%s: %d check-ins of %d users at %d places in %d days", folder, len(check_ins.user),
             len(np.unique(check_ins.user)), len(np.unique(check_ins.poi)), args.days)


if __name__ == "__main__":
    cli.run(main)
