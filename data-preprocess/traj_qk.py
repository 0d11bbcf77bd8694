"""Samples → each trajectory as text, to find (key) and to find by (query), for traj_sim.py.

    python data-preprocess/traj_qk.py -dataset_name nyc

Writes {train,test}_kq_pairs.json.
"""

from checkins import config, questions
from ga_llm import artifacts, cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("-dataset_name", required=True, help="nyc, tky, ca, or any with a best_conf/<name>.yml")
    questions.write_keys_and_queries(config.load(artifacts.config_file(parser.parse_args().dataset_name)))


if __name__ == "__main__":
    cli.run(main)
