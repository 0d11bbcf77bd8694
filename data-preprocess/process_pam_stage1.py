"""Samples → stage-1 questions of PAM: id, category and most frequent successors of the POI behind each `<POI n>`.

    python data-preprocess/process_pam_stage1.py -dataset_name nyc

Made of train alone. Writes train_qa_pairs_<data set>_pam.json. With -history True they are the released code's: behind
the user's whole history, the id of the target's <POI n> (with `gps` in -fields its coordinates, too, for
finetune_GCIM.py --poi_embedding_path, which trains GCIM and PAM together).
"""
from checkins import config, questions, transitions
from ga_llm.base import cli, prompts

SHOWN = "time,user,poi,category"


def main() -> None:
    parser = cli.Parser(__doc__)
    config.add_flags(parser)
    parser.add_argument("-history", type=cli.boolean, default=False, metavar="True|False",
                        help="show the history and ask the id of the target's <POI n>, as the released code does")
    parser.add_argument("-fields", help=f"with -history: what a check-in shows beside <POI n> (default: {SHOWN})")
    args = parser.parse_args()
    if args.fields and not args.history:
        raise cli.UserError("-fields: what a check-in of the history shows; add -history True")
    fields = questions.shown_fields(args.fields or SHOWN, prompts.FIELDS, 2, use_pam=True) if args.history else ()
    transitions.write_questions(config.from_flags(args), fields)


if __name__ == "__main__":
    cli.run(main)
