"""Shared-prefix training against separate prompts: tokens of an epoch on a real data set, and the time of a part of it.

    python benchmarks/shared_prefix.py -dataset_name nyc --model models/smollm2-135m

Needs the data set's samples (run.py) and a base model (tools/get_smollm2.py). First it counts an epoch's tokens and
check-ins, in prompts and in trees, for the questions as the paper has them and with -history_step, with room for all
of each prompt (nothing is cut) and at 32,768 tokens. The bound is what is left if every token that any two prompts
begin with alike is computed once. It also counts what padding costs ordinary batches of four.

Then both sides train on the same pairs of whole users, drawn evenly from all users in order of their tokens: prompts
one by one as the README's command does, and trees of at most --tree_tokens. The model is the base model's first
--layers layers, in bf16 with stage 2's LoRA, norms trained, full attention, activation checkpointing; a step is forward
and backward. Users are taken in turn, so that a busy machine does not decide. The limit in docs/measured.md: 4 times
fewer check-ins with -history_step 100. The exit code is 1 if it is missed.
"""
import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "data-preprocess")]

from ga_llm.base import artifacts, prompts  # noqa: E402
from ga_llm.llm import backbone, shared_prefix  # noqa: E402
from ga_llm.pairs import sft_data, token_cache  # noqa: E402
from checkins import config as configs  # noqa: E402
from checkins import questions, samples  # noqa: E402
from geo_encoder import gps_tokens, injection  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers.trainer_pt_utils import LengthGroupedSampler  # noqa: E402

FEWER = 4
ROOM = 65536        # tokens: no prompt of NYC is longer
# What process_llm_gps.py is told (-max_history, -history_step), and --model_max_length.
SETTINGS = ((600, None, ROOM), (600, 100, ROOM), (600, None, 32768), (450, 100, 32768))


def training_data(folder: Path, config, fields, tokenizer, length: int, mapping) -> tuple:
    """The training pairs as tokens, as process_llm_gps.py writes them, and the user of each."""
    train, path = samples.load(config, "train"), folder / "train.json"
    texts = questions.texts(train, fields)
    with path.open("wb") as file:
        questions.write_json_array(file, questions.records(config, 2, train, texts, train, texts,
                                                           questions.pairs(config, train, train, None),
                                                           samples.load_places(config)))
    users = [int(train["UserId"].iat[pair.target]) for pair in questions.pairs(config, train, train, None)]
    return token_cache.load(path, tokenizer, length, mapping), np.array(users)


def count_check_ins(dataset, trees, places: np.ndarray) -> tuple[int, int, int]:
    """How many `<GPS n>` the prompts hold, the trees, and all that is not an equal beginning of two prompts.

    A check-in shows one; a question for a POI shows none.
    """
    prompts_ = [dataset[i]["input_ids"] for i in range(len(dataset))]
    # Of prompts in lexicographic order, each shares most with the one before it.
    ordered = sorted(prompts_, key=lambda ids: ids.astype(">u4").tobytes())
    bound = np.isin(ordered[0], places).sum() + sum(np.isin(ids[shared_prefix.common(before, ids):], places).sum()
                                                    for before, ids in zip(ordered, ordered[1:]))
    collate = shared_prefix.TreeCollator()
    return (sum(np.isin(ids, places).sum() for ids in prompts_),
            sum(np.isin(collate([trees[i]])["input_ids"], places).sum() for i in range(len(trees))), bound)


def padding(lengths, order, batch: int = 4) -> float:
    """The share of padding in batches of pairs drawn in `order`."""
    batches = np.array(list(order))[:len(lengths) // batch * batch].reshape(-1, batch)
    return 1 - lengths[batches].sum() / (lengths[batches].max(axis=1) * batch).sum()


def draw_users(dataset, users, count: int) -> list[np.ndarray]:
    """The pairs of `count` users, drawn evenly from all users in order of their tokens."""
    tokens = np.bincount(users, weights=dataset.lengths)
    order = [user for user in tokens.argsort(kind="stable") if tokens[user]]
    return [np.flatnonzero(users == order[int((i + 0.5) * len(order) / count)]) for i in range(count)]


def build(args, attention: str, mapping):
    torch.manual_seed(0)
    model = backbone.load_llm(args.model, ROOM, attention, torch.bfloat16)
    model.model.layers = model.model.layers[:args.layers]
    token_ids = gps_tokens.add_gps_tokens(backbone.load_tokenizer(args.model), mapping, model)
    injection.attach_untrained(model, mapping, token_ids)
    model = backbone.add_lora(model, 8, 16, dropout=0.1)
    backbone.train_by_name(model, "norm")
    backbone.trainable_to_fp32(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(model, batches) -> float:
    """Seconds of forward and backward."""
    started = time.perf_counter()
    for batch in batches:
        with torch.autocast("cpu" if not torch.cuda.is_available() else "cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-dataset_name", default="nyc")
    parser.add_argument("-fields", default=",".join(prompts.FIELDS))
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--users", type=int, default=3)
    parser.add_argument("--tree_tokens", type=int, default=2 * ROOM)
    args = parser.parse_args()

    config = configs.load(artifacts.config_file(args.dataset_name))
    mapping_path = artifacts.preprocessed(args.dataset_name) / artifacts.gps_mapping(args.dataset_name)
    mapping = gps_tokens.read_gps_mapping(mapping_path)
    fields = questions.shown_fields(args.fields, prompts.FIELDS, 2)
    tokenizer = backbone.load_tokenizer(args.model)
    places = gps_tokens.add_gps_tokens(tokenizer, mapping)

    print(f"{'-max_history, -history_step':29}{'room':>6}{'cut':>5}{'tokens':>12}{'in trees':>12}{'fewer':>7}"
          f"{'check-ins':>11}{'in trees':>10}{'bound':>9}{'fewer':>7}{'trees':>7}", flush=True)
    fewer, kept = {}, None
    with tempfile.TemporaryDirectory() as folder:
        for history, step, length in SETTINGS:
            asked = dataclasses.replace(config, max_history=history, history_step=step)
            dataset, users = training_data(Path(folder), asked, fields, tokenizer, length, mapping_path)
            trees = shared_prefix.TreeDataset(dataset, args.tree_tokens)
            alone, shared, bound = count_check_ins(dataset, trees, places)
            kept, fewer[step, length] = kept or (dataset, users), alone / shared
            tokens, in_trees = int(dataset.lengths.sum()), int(trees.lengths.sum())
            name = f"{history}, {step}" if step else f"{history}, none: the paper's"
            print(f"{name:29}{length:6}{int((dataset.tokens > dataset.lengths).sum()):5}{tokens:12,}{in_trees:12,}"
                  f"{tokens / in_trees:7.2f}{alone:11,}{shared:10,}{bound:9,}{alone / shared:7.2f}{len(trees):7,}",
                  flush=True)

        dataset, users = kept
        orders = {"random order": torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist(),
                  "--train_sampling_strategy group_by_length": LengthGroupedSampler(
                      4, lengths=dataset.lengths.tolist(), generator=torch.Generator().manual_seed(0))}
        print()
        for name, order in orders.items():
            print(f"padding in batches of 4 prompts, {name}: {padding(dataset.lengths, order):.1%}")

        drawn = draw_users(dataset, users, args.users)
        models = {name: build(args, name, mapping) for name in ("sdpa", shared_prefix.SHARED_PREFIX)}
        separate, collate = sft_data.AnswerCollator(tokenizer.pad_token_id), shared_prefix.TreeCollator()
        trees = shared_prefix.TreeDataset(dataset, args.tree_tokens)
        print(f"\n{'users drawn':20}{'pairs':>7}{'tokens':>10}{'in trees':>10}{'fewer':>7}{'s':>9}{'s in trees':>12}"
              f"{'faster':>8}", flush=True)
        total = np.zeros(5)
        for warm, pairs in [(True, drawn[0][:1]), *((False, pairs) for pairs in drawn)]:
            own = [tree for tree in trees.trees if tree.first in pairs]
            assert warm or sum(len(tree.shared) for tree in own) == len(pairs)
            items = [trees[trees.trees.index(tree)] for tree in own]
            seconds = [train(models["sdpa"], (separate([dataset[i]]) for i in pairs)),
                       train(models[shared_prefix.SHARED_PREFIX], (collate([item]) for item in items))]
            if warm:
                continue
            row = np.array([len(pairs), dataset.lengths[pairs].sum(), sum(tree.tokens for tree in own), *seconds])
            total += row
            _print(f"user {users[pairs[0]]}", row)
        _print("all", total)
        epoch = int(dataset.lengths.sum()) / total[1] * total[3]
    print(f"\nby the drawn tokens an epoch of these {args.layers} layers would take {epoch / 3600:.1f} h, in trees "
          f"{epoch / 3600 * total[4] / total[3]:.1f} h (scaled, not measured)")
    for step, name in ((None, "as in the paper"), (100, "-history_step 100")):
        print(f"check-ins, {name}: {fewer[step, ROOM]:.2f} times fewer (limit: {FEWER}): "
              f"{'met' if fewer[step, ROOM] >= FEWER else 'missed'}")
    sys.exit(bool(fewer[100, ROOM] < FEWER))


def _print(name: str, row) -> None:
    pairs, tokens, in_trees, alone, shared = row
    print(f"{name:20}{int(pairs):7}{int(tokens):10,}{int(in_trees):10,}{tokens / in_trees:7.2f}{alone:9.1f}"
          f"{shared:12.1f}{alone / shared:8.2f}", flush=True)


if __name__ == "__main__":
    main()
