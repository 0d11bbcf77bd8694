"""Samples → each trajectory as text, to find (key) and to find by (query), for traj_sim.py.

    python data-preprocess/traj_qk.py -dataset_name nyc

Writes {train,test}_kq_pairs.json.
"""

from checkins import config, questions
from ga_llm.base import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    config.add_flags(parser)
    questions.write_keys_and_queries(config.from_flags(parser.parse_args()))


if __name__ == "__main__":
    cli.run(main)
