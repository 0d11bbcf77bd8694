"""Raw check-ins → samples, GPS mapping, label encoding and counts.

    python data-preprocess/run.py -f best_conf/nyc.yml

Writes to datasets/<data set>/preprocessed/: sample.csv, {train,validate,test}_sample.csv, <data set>_gps_mapping.csv,
label_encoding.json and stats.json.
"""
import logging

from checkins import config, samples
from ga_llm.base import cli, writing


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("-f", required=True, metavar="FILE", help="the data set's YAML, e.g. best_conf/nyc.yml")
    config.add_datasets_flag(parser)
    args = parser.parse_args()
    conf = config.load(args.f, args.datasets)
    with writing.alone(conf.folder):
        made = samples.make(conf)
        samples.write(conf, made)
    print(samples.table_of_stats(conf, made.stats))
    logging.info("written to %s", conf.folder)


if __name__ == "__main__":
    cli.run(main)
