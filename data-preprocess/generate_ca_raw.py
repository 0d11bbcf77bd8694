"""Gowalla's check-ins in California and Nevada, with their spots' categories → raw file of the data set ca.

    python data-preprocess/generate_ca_raw.py

Reads and writes the files under `raw:` in best_conf/ca.yml.
"""
import logging

from checkins import config
from ga_llm.base import artifacts, cli, writing


def main() -> None:
    cli.Parser(__doc__).parse_args()
    conf = config.load(artifacts.config_file("ca"))
    cli.needed("shapely", "the states' polygons")
    from checkins import gowalla    # which imports it
    path = gowalla.output(conf)
    with writing.alone(path.parent):
        rows = gowalla.join(conf)
        with writing.atomic_write(path) as file:
            rows.to_csv(file, index=False)
    logging.info("%d check-ins written to %s", len(rows), path)


if __name__ == "__main__":
    cli.run(main)
