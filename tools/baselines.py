"""What needs no LLM, on a data set's test pairs: the figures that any result has to beat.

    python tools/baselines.py -dataset_name nyc -pointer True

Prints the baselines' metrics, with 95 % intervals, on the pairs of each protocol. `test_next_gps.py` prints the same
beside every model's. The pointer alone (docs/pointer.md) is among them once -pointer True has trained it, in minutes.
"""
from ga_llm.base import artifacts
from ga_llm.base.cli import Parser, boolean, run
from ga_llm.evaluation import baselines, metrics, protocols
from ga_llm.pairs import sft_data, spelling
from ga_llm.tables import pointer_training
from geo_encoder.gps_tokens import read_gps_mapping


def main():
    parser = Parser(__doc__)
    parser.add_argument("-dataset_name", required=True)
    parser.add_argument("-data_path", default=str(artifacts.DATASETS))
    parser.add_argument("-pointer", type=boolean, default=False, metavar="True|False",
                        help="train the pointer alone on the data set's samples, if that is not done")
    args = parser.parse_args()
    folder = artifacts.preprocessed(args.dataset_name, args.data_path)
    test_file = folder / artifacts.questions("test", args.dataset_name, 2, use_sim=False)
    pairs = sft_data.read_test_pairs(test_file, artifacts.questions_command(args.dataset_name))
    spelling.read_answers(pairs, test_file)
    train = baselines.read_train(folder / artifacts.split_sample("train"))
    if args.pointer:
        pointer_training.train(folder)
    mapping = read_gps_mapping(folder / artifacts.gps_mapping(args.dataset_name))
    for protocol, what in protocols.PROTOCOLS.items():
        asked = protocols.select(protocol, spelling.untokenized(pairs), folder / artifacts.SAMPLE)
        targets = [prompt.target for prompt in asked]
        rows = {name: metrics.summary(found.ranks, metrics.distances(found.tops, targets, mapping))
                for name, found in baselines.rankings(train, asked, folder).items()}
        print(f"protocol {protocol}: {what}\n")
        for columns in metrics.BLOCKS:
            print(metrics.table(rows, columns) + "\n")


if __name__ == "__main__":
    run(main)
