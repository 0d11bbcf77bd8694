"""Evaluation: how often is the true next POI among the first k? (Paper, Section 4.3.)

    python test_next_gps.py --base_model M --output_dir O/checkpoint-N --dataset_name nyc --data_path datasets \
        --test_file test_qa_pairs_kqt_200items_nyc_llm_without_sim_gps.txt --test_type llm \
        --gps_mapping_path G.csv --geoencoder_path O1/N/geo_encoder_merged.pth

Ranks every POI exactly (--decoding rank) or samples one answer as the paper's code does (--decoding sample). Prints the
metrics, beside two baselines on the same pairs, and writes metrics.json and predictions.jsonl.
"""
import argparse
import json
import logging
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ga_llm import artifacts, baselines, checkpoints, llm, metrics, ranking, sft_data
from ga_llm.cli import UserError, boolean, run, show_progress
from geo_encoder import encoder, gps_tokens, injection, weights

log = logging.getLogger("test")
TEST_TYPES = {"base": "the base model: no adapter, no GPS embedding", "projector": "GPS embedding, no adapter",
              "llm": "both"}
MADE_BY = "python data-preprocess/process_llm_gps.py -dataset_name {} -use_sim False"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", help="folder of the base LLM (default: --model_path)")
    parser.add_argument("--model_path", help="the same, by its other name")
    parser.add_argument("--output_dir", required=True, help="stage 2's checkpoint-N; results go here, those of other "
                        "test types and of --decoding sample into folders of their own")
    parser.add_argument("--cache_dir")
    parser.add_argument("--data_path", default=str(artifacts.DATASETS))
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--test_file", help="a file in <data_path>/<dataset_name>/preprocessed")
    parser.add_argument("--test_type", choices=TEST_TYPES, default="llm", help=str(TEST_TYPES))
    parser.add_argument("--gps_mapping_path", help="default: that of the data set")
    parser.add_argument("--geoencoder_path", help="stage 1's geo_encoder_merged.pth; without it no GPS embedding")
    parser.add_argument("--use_random_projector", type=boolean, default=False, help="an untrained encoder instead")
    parser.add_argument("--decoding", choices=("rank", "sample"), default="rank")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=32768, help="tokens; longer prompts are cut from the left")
    parser.add_argument("--context_size", type=int, default=32768, help="--model_max_length of the training")
    parser.add_argument("--flash_attn", type=boolean, default=True)
    parser.add_argument("--load_in_4bit", type=boolean, default=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--limit", type=int, help="only the first so many pairs")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    args.base_model = args.base_model or args.model_path
    if not args.base_model:
        raise UserError("--base_model is required: the folder of the base LLM")
    folder = artifacts.preprocessed(args.dataset_name, args.data_path)
    args.test_file = folder / (args.test_file or artifacts.questions("test", args.dataset_name, 2, use_sim=False))
    args.gps_mapping_path = args.gps_mapping_path or folder / artifacts.gps_mapping(args.dataset_name)
    args.train_sample = folder / artifacts.split_sample("train")
    # Only the trained model's ranking lies beside the checkpoint itself; the others must not replace it.
    variant = [args.test_type] * (args.test_type != "llm") + [args.decoding] * (args.decoding != "rank")
    args.results = Path(args.output_dir) / "_".join(variant)
    return args


def load_model(args, mapping):
    """The LLM as `--test_type` asks for it, and its tokenizer with the <GPS n> tokens."""
    full = args.test_type == "llm" and checkpoints.holds_full_model(args.output_dir)
    base = args.output_dir if full else args.base_model
    tokenizer = llm.load_tokenizer(base, args.cache_dir)
    gpu = torch.cuda.is_available()
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    # Ranking hands the model a mask of the trie, which flash-attn does not take.
    attention = llm.training_attention(args.flash_attn, full=True) if args.decoding == "sample" else "sdpa"
    four_bit = args.load_in_4bit and gpu and not full
    model = llm.load_llm(base, args.context_size, attention, dtype, four_bit, args.cache_dir)
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, model)
    if args.test_type != "base":
        if args.use_random_projector:
            config = encoder.GeoEncoderConfig(model.get_input_embeddings().embedding_dim)
            injection.attach_table(model, encoder.build_encoder(config), config.level, mapping, token_ids)
        elif args.geoencoder_path:
            injection.attach_frozen(model, args.geoencoder_path, mapping, token_ids)
        elif args.test_type == "projector":
            raise UserError("--test_type projector needs --geoencoder_path (or --use_random_projector True)")
    if args.test_type == "llm" and not full:
        checkpoints.check_agreement(args.output_dir, args.context_size, model.config.max_position_embeddings)
        model = checkpoints.load_adapter(model, args.output_dir)
    return model.eval(), tokenizer


def predict(args, model, tokenizer, spelling, test_prompts) -> dict[int, dict]:
    """For each pair its rank and best candidates; similar lengths share a batch."""
    candidates = list(spelling.tokens)
    trie = ranking.Trie(list(spelling.tokens.values()))
    place = {poi: i for i, poi in enumerate(candidates)}
    by_length = sorted(test_prompts, key=lambda prompt: -len(prompt.input_ids))
    predictions = {}
    for first in tqdm(range(0, len(by_length), args.batch_size), disable=not show_progress(), unit="batch"):
        batch = by_length[first:first + args.batch_size]
        sequences = [prompt.input_ids for prompt in batch]
        if args.decoding == "sample":
            answers = ranking.sample_ids(model, tokenizer, sequences)
            for prompt, answer in zip(batch, answers):
                predictions[prompt.pair] = {"rank": 1 if answer == prompt.target else None, "top": [[answer, None]]}
            continue
        for prompt, row in zip(batch, ranking.log_probabilities(model, sequences, trie, tokenizer.pad_token_id)):
            best = row.topk(min(20, len(candidates)))
            rank = ranking.rank_of(row, place[prompt.target]) if prompt.target in place else None
            predictions[prompt.pair] = {"rank": rank, "top": [[candidates[i], round(value, 4)] for i, value in
                                                              zip(best.indices.tolist(), best.values.tolist())]}
    return predictions


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    mapping = gps_tokens.read_gps_mapping(args.gps_mapping_path)
    pairs = sft_data.read_test_pairs(args.test_file, MADE_BY.format(args.dataset_name))[:args.limit]
    sft_data.check_gps_ids(pairs, mapping.ids, args.test_file, args.gps_mapping_path)
    ends = ranking.read_answers(pairs, args.test_file)
    train = baselines.read_train(args.train_sample)
    if args.geoencoder_path and args.test_type != "base":
        artifacts.require(args.geoencoder_path, weights.MADE_BY)

    model, tokenizer = load_model(args, mapping)
    spelling = ranking.Spelling(tokenizer, sorted(mapping.ids.tolist()), ends)
    limit = min(args.seq_len, args.context_size)
    test_prompts = [spelling.prompt(i, pair, limit) for i, pair in enumerate(pairs)]
    started = time.perf_counter()
    predictions = predict(args, model, tokenizer, spelling, test_prompts)
    seconds = time.perf_counter() - started

    report = metrics.report(test_prompts, predictions, baselines.ranks(train, test_prompts), seconds)
    report["settings"] = {key: str(value) for key, value in vars(args).items()}
    with artifacts.atomic_write(args.results / artifacts.PREDICTIONS) as file:
        for prompt in test_prompts:
            record = {"pair": prompt.pair, "target": prompt.target, "fits": prompt.fits, **predictions[prompt.pair]}
            file.write(json.dumps(record) + "\n")
    with artifacts.atomic_write(args.results / artifacts.METRICS) as file:
        json.dump(report, file, indent=2)
    print(metrics.text(report, args.decoding))
    print(f"wrote {args.results / artifacts.METRICS} and {args.results / artifacts.PREDICTIONS}")


if __name__ == "__main__":
    run(main)
