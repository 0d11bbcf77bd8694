"""What it takes to answer real test prompts: exact ranking of every POI, sampling one by one, and a beam search.

    python benchmarks/ranking.py -dataset_name nyc --model models/smollm2-135m

Needs the data set's samples (run.py) and a base model (tools/get_smollm2.py). All sides read the same prompts with the
same model in one run: those of whole users, drawn evenly from all users in order of their number of prompts, with as
much history as the context holds. The beam search, which reads a prompt once for every beam, is timed on every few of
them, drawn evenly in order of length. The limits in docs/measured.md: 3.5 times the prompts per second of sampling,
20 times those of the beam search, 1.25 times the time of reading each distinct token once. The exit code is 1 if one is
missed.
"""
import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "data-preprocess")]

import torch  # noqa: E402

from ga_llm.base import artifacts, prompts  # noqa: E402
from ga_llm.evaluation import decoding, ranking  # noqa: E402
from ga_llm.llm import backbone  # noqa: E402
from ga_llm.llm.tree_attention import TREE  # noqa: E402
from ga_llm.pairs import spelling  # noqa: E402
from checkins import config as configs  # noqa: E402
from checkins import questions, samples  # noqa: E402
from geo_encoder import gps_tokens, injection  # noqa: E402

FASTER_THAN_SAMPLING, FASTER_THAN_BEAMS, SLOWER_THAN_READING = 3.5, 20, 1.25


def test_pairs(dataset: str, max_history: int, fields: tuple[str, ...]) -> list[str]:
    """The joined test pairs, as process_llm_gps.py writes them with -max_history and -fields."""
    config = dataclasses.replace(configs.load(artifacts.config_file(dataset)), max_history=max_history)
    train, test = samples.load(config, "train"), samples.load(config, "test")
    records = questions.records(config, 2, test, questions.texts(test, fields), train, questions.texts(train, fields),
                                questions.pairs(config, train, test, None), samples.load_places(config))
    return [prompts.join(record["question"], record["answer"]) for record in records]


def whole_users(test_prompts, count: int):
    """The prompts of `count` users, drawn evenly from all users ordered by number of prompts and of tokens."""
    by_user = {}
    for prompt in test_prompts:
        by_user.setdefault(prompt.user, []).append(prompt)
    users = sorted(by_user.values(), key=lambda own: (len(own), sum(len(p.input_ids) for p in own)))
    return [prompt for i in range(count) for prompt in users[int((i + 0.5) * len(users) / count)]]


@torch.inference_mode()
def read(model, groups) -> None:
    """A prefill of the distinct tokens of each group, one behind the other, in one plain forward; no answer."""
    for group in groups:
        members = [prompt for chunk in group.chunks for prompt in chunk]
        tails = [prompt.input_ids[len(group.trunk):] for prompt in members]
        for ids in [group.trunk + sum(tails, [])] if group.trunk else tails:
            model(torch.tensor([ids], device=model.device), use_cache=True, logits_to_keep=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-dataset_name", default="nyc")
    parser.add_argument("-max_history", type=int, default=110, help="check-ins of history")
    parser.add_argument("-fields", default=",".join(prompts.FIELDS))
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--context_size", type=int, default=8192)
    parser.add_argument("--users", type=int, default=6)
    parser.add_argument("--beam_every", type=int, default=10, help="the beam search reads every so manieth prompt")
    args = parser.parse_args()

    folder = artifacts.preprocessed(args.dataset_name)
    mapping = gps_tokens.read_gps_mapping(folder / artifacts.gps_mapping(args.dataset_name))
    tokenizer = backbone.load_tokenizer(args.model)
    model = backbone.load_llm(args.model, args.context_size, "sdpa", torch.bfloat16)     # but for ranking, see `ranked`
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, model)
    torch.manual_seed(0)
    injection.attach_untrained(model, mapping, token_ids)
    model.eval()

    pairs = test_pairs(args.dataset_name, args.max_history, questions.shown_fields(args.fields, prompts.FIELDS, 2))
    ids = sorted(mapping.ids.tolist())
    told, whole = (spelling.Spelling(tokenizer, ids, ".", always_end) for always_end in (False, True))
    everyone = told.prompts(pairs, args.context_size)
    sample = whole_users(everyone, args.users)
    few = sorted(sample, key=lambda p: len(p.input_ids))[args.beam_every // 2::args.beam_every]
    tries = {spelled: ranking.Trie(spelled.tokens) for spelled in (told, whole)}
    for what, chosen in (("all", everyone), ("drawn", sample)):
        tokens, distinct = sum(len(p.input_ids) for p in chosen), sum(g.tokens for g in ranking.plan(chosen, 8))
        bound, cut = tokens / distinct, sum(not p.fits for p in chosen)
        print(f"{what}: {len(chosen)} prompts ({cut} cut) of {len({p.user for p in chosen})} users, {tokens} tokens, "
              f"{distinct} distinct: {bound:.2f} times fewer", flush=True)

    seconds = {}

    def timed(name, chosen, work):
        started = time.perf_counter()
        work()
        seconds[name] = (time.perf_counter() - started) / len(chosen)
        print(f"{name:44}{len(chosen):8}{seconds[name] * len(chosen):10.1f}{1 / seconds[name]:12.4f}", flush=True)

    def decoded(how, trie, chosen, batch_size):
        return lambda: sum(1 for _ in decoding.decode(how, model, tokenizer, trie, chosen, batch_size))

    def ranked(trie):
        model.set_attn_implementation(TREE)
        decoded("rank", trie, sample, 8)()
        model.set_attn_implementation("sdpa")

    print(f"\n{'':44}{'prompts':>8}{'seconds':>10}{'prompts/s':>12}")
    decoded("rank", tries[told], few[:1], 8)()                                               # warm up
    timed("reading each distinct token once", sample, lambda: read(model, ranking.plan(sample, 8)))
    timed("exact ranking", sample, lambda: ranked(tries[told]))
    timed("sampling, one by one", sample, decoded("sample", tries[told], sample, 1))
    timed("exact ranking, whole answers (--always_end)", sample, lambda: ranked(tries[whole]))
    beams = f"beam search, {decoding.BEAMS} beams, one by one"
    timed(beams, few, decoded("beam", tries[whole], few, 1))

    ours = seconds["exact ranking"]
    share = seconds["sampling, one by one"] / ours / bound
    print(f"\nexact ranking reaches {share:.0%} of the arithmetic bound against sampling")
    met = [
        _limit("faster than sampling", seconds["sampling, one by one"] / ours, FASTER_THAN_SAMPLING, above=True),
        _limit("faster than the beam search", seconds[beams] / ours, FASTER_THAN_BEAMS, above=True),
        _limit("the time of reading", ours / seconds["reading each distinct token once"], SLOWER_THAN_READING,
               above=False)]
    sys.exit(not all(met))


def _limit(what: str, value: float, limit: float, above: bool) -> bool:
    met = value >= limit if above else value <= limit
    print(f"exact ranking: {value:.2f} times {what} (limit: {limit} at {'least' if above else 'most'}): "
          f"{'met' if met else 'missed'}")
    return met


if __name__ == "__main__":
    main()
