"""Samples → stage-1 questions of PAM: id, category and most frequent successors of the POI behind each `<POI n>`.

    python data-preprocess/process_pam_stage1.py -dataset_name nyc

Made of train alone. Writes train_qa_pairs_<data set>_pam.json.
"""
from checkins import config, transitions
from ga_llm.base import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    config.add_flags(parser)
    transitions.write_questions(config.from_flags(parser.parse_args()))


if __name__ == "__main__":
    cli.run(main)
