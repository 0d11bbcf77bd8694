"""Evaluation: how often is the true next POI among the first k? (Paper, Section 4.3.)

    python test_next_gps.py --output_dir O/checkpoint-N

    python test_next_gps.py --base_model M --output_dir O/checkpoint-N --dataset_name nyc --data_path datasets \
        --test_file test_qa_pairs_kqt_200items_nyc_llm_without_sim_gps.txt --test_type llm \
        --gps_mapping_path G.csv --geoencoder_path O1/N/geo_encoder_merged.pth

The checkpoint remembers what the second command says of the training; a flag overrides it, and is checked.
Ranks every POI exactly (--decoding rank), or searches beams or samples one answer, as others do. Prints the metrics,
beside baselines on the same pairs, and writes metrics.json and predictions.jsonl. Killed, it goes on where it
stopped when it is started again. torchrun --nproc_per_node=8 test_next_gps.py … shares the prompts out to 8 GPUs.

    python test_next_gps.py --compare A/predictions.jsonl B/predictions.jsonl

tells how B differs from A, pair by pair; A1,A2,A3 B1,B2,B3 compares the means of several runs of each.
"""
import argparse
import time
from pathlib import Path

import torch

from ga_llm.base import artifacts, writing
from ga_llm.base.cli import Parser, UserError, boolean, listed, run, token_count, whole_number
from ga_llm.evaluation import (baselines, comparison, decoding, ensemble, metrics, pointed, predictions, protocols,
                               ranking, released, trained)
from ga_llm.evaluation.processes import Processes, together
from ga_llm.llm import backbone, tree_attention
from ga_llm.pairs import sft_data, spelling
from ga_llm.training import run_log
from geo_encoder import gps_tokens, injection


def arguments() -> tuple[argparse.Namespace, dict]:
    """The flags, and what the checkpoint was trained with (`trained.fill_in`)."""
    parser = Parser(__doc__)
    trained.add_flags(parser)
    parser.add_argument("--split", choices=("test", "validate"), default="test", help="whose questions")
    parser.add_argument("--test_file", help="others, in <data_path>/<dataset_name>/preprocessed")
    parser.add_argument("--test_type", choices=trained.TEST_TYPES, default="llm", help=str(trained.TEST_TYPES))
    parser.add_argument("--use_random_projector", type=boolean, default=False, help="an untrained encoder instead")
    parser.add_argument("--pointer", type=boolean, default=True, help="False: a model with a pointer, without it")
    protocols.add_flags(parser)
    parser.add_argument("--decoding", choices=decoding.DECODINGS, default="rank")
    parser.add_argument("--always_end", type=boolean, default=False, help="log P of the whole answer, its '.' included")
    parser.add_argument("--full_table", type=boolean, default=False, help="write log P of every POI, too")
    parser.add_argument("--average_with", nargs="+", default=[], metavar="FILE.npy",
                        help="log_probabilities.npy of other runs: average their probabilities with this one's")
    released.add_flags(parser)
    parser.add_argument("--batch_size", type=whole_number(1), default=8)
    parser.add_argument("--seq_len", type=token_count, help="longer prompts are cut from the left (default: as above)")
    parser.add_argument("--flash_attn", type=boolean, default=True)
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=42)
    parser.add_argument("--compare", nargs=2, type=listed(Path), metavar="PREDICTIONS",
                        help="compare predictions.jsonl, each a run or several with commas, and no more")
    args = parser.parse_args()
    if args.compare:
        return args, {}
    agreement = trained.fill_in(args)
    args.full_table |= bool(args.average_with)       # every POI's probability
    for path in args.average_with:
        artifacts.require(path, ensemble.MADE_BY)
    decoding.check_table(args.decoding, args.full_table)
    args.folder = folder = artifacts.preprocessed(args.dataset_name, args.data_path)
    args.test_file = folder / (args.test_file or artifacts.questions(args.split, args.dataset_name, 2,
                                                                     *trained.question_kind(agreement)))
    args.split = artifacts.split_of(args.test_file, args.dataset_name)
    args.results = Path(args.output_dir) / artifacts.results(vars(args))
    return args, agreement


def predict(args, processes, model, tokenizer, test_prompts, trie) -> tuple[predictions.Store, float | None]:
    """Rank the POIs for every prompt, and count the prompts per second; what an interrupted run left is kept.

    The first of several processes has all predictions in the end.
    """
    key = predictions.key(vars(args), [args.test_file, args.gps_mapping_path], trained.files(args))
    store = predictions.Store(args.results, key, trie.candidates if args.full_table else (),
                              1 + max(prompt.pair for prompt in test_prompts), processes.rank)
    store.done = {pair: store.done.get(pair) for pair in processes.agree(list(store.done))}
    started, done = time.perf_counter(), frozenset(store.done)
    for chunk, results in decoding.decode(args.decoding, model, tokenizer, trie, test_prompts, args.batch_size,
                                          args.full_table, done, args.seed, processes):
        store.add(chunk, results)
    processes.finish()
    if processes.rank == 0:
        store.read()
        store.check(test_prompts)
    new = len(store.done) - len(done)
    return store, new / (time.perf_counter() - started) if new else None


def main(processes: Processes):
    args, agreement = arguments()
    if args.compare:
        return print(comparison.compare(*args.compare)) if processes.rank == 0 else None
    torch.manual_seed(args.seed)
    injection.check_paths(args)
    mapping = gps_tokens.read_gps_mapping(args.gps_mapping_path)
    made_by = artifacts.questions_command(args.dataset_name, *trained.question_kind(agreement))
    pairs = sft_data.read_test_pairs(args.test_file, made_by)[:args.limit]
    pairs = list(map(released.asked, pairs)) if args.released_prompt else pairs
    sft_data.check_places(pairs, trained.known_places(args, agreement, mapping), args.test_file, args.gps_mapping_path)
    end = spelling.read_answers(pairs, args.test_file)
    train = baselines.read_train(args.folder / artifacts.split_sample("train"))

    if processes.rank == 0:
        writing.hold(args.results)
    # Ranking hands the model a mask of the trie, which flash-attn does not take.
    attention = (tree_attention.TREE if args.decoding == "rank" else
                 backbone.training_attention(args.flash_attn, full=True))
    model, tokenizer = trained.load(args, agreement, mapping, attention, args.test_type, args.use_random_projector)
    ends = args.always_end or args.decoding == "beam"
    length = min(args.seq_len, args.context_size)
    spelled = spelling.Spelling(tokenizer, sorted(mapping.ids.tolist()), end, ends)
    test_prompts = spelled.prompts(pairs, length, args.test_file)
    test_prompts = protocols.select(args.protocol, test_prompts, args.folder / artifacts.SAMPLE)
    if not test_prompts:
        raise UserError(f"{args.test_file}: --protocol {args.protocol} has none of its {len(pairs)} pairs")
    test_prompts = protocols.draw(test_prompts, args.draw)
    fits = released.fitting(test_prompts, tokenizer, length, args.folder / artifacts.SAMPLE)
    test_prompts = pointed.prepare(args, model, test_prompts, mapping, tokenizer)
    trie = ranking.Trie(spelled.tokens)
    store, speed = predict(args, processes, model, tokenizer, test_prompts, trie)
    if processes.rank > 0:
        return

    found, others = store.ranking(test_prompts), baselines.rankings(train, test_prompts, args.folder)
    if args.average_with:
        found, others = ensemble.averaged(args.average_with, store, test_prompts, trie.candidates, others)
    report = metrics.report(test_prompts, found, others, train, mapping, speed, args.protocol, args.decoding, fits)
    report |= run_log.describe_evaluation(processes.size)
    published = protocols.published(args.folder / artifacts.STATS, args.protocol, args.split)
    report |= {"split": args.split, "published_n": published}
    report["settings"] = {name: str(value) for name, value in vars(args).items()}
    km = metrics.distances(found.tops, [prompt.target for prompt in test_prompts], mapping)
    written = store.finish(test_prompts, km, report)
    print(metrics.text(report))
    print(f"wrote {' and '.join(str(args.results / name) for name in written)}")


if __name__ == "__main__":
    run(together(main))
