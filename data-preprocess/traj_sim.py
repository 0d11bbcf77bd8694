"""Trajectories as text → for each the most similar earlier ones of any user, for `-use_sim True` of the questions.

    python data-preprocess/traj_qk.py -dataset_name nyc
    python data-preprocess/traj_sim.py -dataset_name nyc                                        # no LLM, seconds
    python data-preprocess/traj_sim.py -dataset_name nyc -encoder llm -model_name_or_path M     # as LLM4POI does it

Writes {train,test}_key_top200.json: trajectory id → ids of train trajectories, the most similar first. A trajectory is
searched for by what is known before its target, among whole trajectories that had ended before its first check-in.
The LLM's vectors are kept beside them in vectors-<key>.npy; a run that was killed goes on where it stopped.
"""
from checkins import config, similar
from ga_llm.base import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    config.add_flags(parser)
    parser.add_argument("-encoder", choices=("light", "llm"), default="light",
                        help="TF-IDF of places, categories and times, or an LLM's mean hidden state (default: light)")
    parser.add_argument("-top", type=cli.whole_number(1, similar.MOST), default=similar.MOST, metavar="N",
                        help="how many trajectories at most (default: %(default)s)")
    llm = parser.add_argument_group("with -encoder llm")
    llm.add_argument("-model_name_or_path", metavar="M", help="the LLM's folder")
    llm.add_argument("-max_tokens", type=cli.token_count, default=2048, metavar="N",
                     help="of longer texts the end is read (default: %(default)s)")
    llm.add_argument("-batch_size", type=cli.whole_number(1, 4096), default=8, metavar="N",
                     help="texts at once (default: %(default)s)")
    llm.add_argument("-dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    args = parser.parse_args()
    if (args.encoder == "llm") != (args.model_name_or_path is not None):
        raise cli.UserError(f"-encoder {args.encoder}: " + (
            "needs an LLM; give -model_name_or_path" if args.encoder == "llm" else
            "reads no LLM; leave -model_name_or_path out, or give -encoder llm"))
    conf = config.from_flags(args)
    if args.encoder == "light":
        similar.write(conf, similar.light, args.top)
    else:
        from ga_llm.llm.text_vectors import TextEncoder     # torch; the other encoder needs none
        similar.write(conf, similar.by_text(TextEncoder(args.model_name_or_path, args.max_tokens, args.batch_size,
                                                        args.dtype, conf.folder)), args.top)


if __name__ == "__main__":
    cli.run(main)
