"""What GPS injection costs in training: a step with it and without it, and encoding every token by itself.

    python benchmarks/injection.py -dataset_name nyc --model models/smollm2-135m

Needs the data set's samples (run.py) and a base model (tools/get_smollm2.py). All sides run in turn on the same
tokens: real training questions whose history is cut so that each holds --gps_tokens `<GPS n>`. Of all that have as
many, two are taken: the one with the median number of distinct places, and the one with the most. By default a
check-in shows its id and its GPS token alone (-fields), which makes the share of the encoder the largest: with all of
stage 1's fields there are five times as many tokens for the LLM to read beside the same GPS tokens.

A step is forward, backward, clipping and AdamW as the training scripts have them: S²-Attn, activation checkpointing,
bf16 autocast, what is trained in fp32. The base is in bf16: in 4 bits the LLM is slower and the encoder's share
smaller.

stage 1: the encoder with LoRA (r 256) and its dropouts, the LLM frozen but for LoRA (r 256).
stage 2: the encoder frozen, as a table; the LLM with LoRA (r 8), embeddings and norms trained.
by itself: the encoder is called for one `<GPS n>` at a time, with gradient, as in the paper's code.

The limits that docs/measured.md claims, against the same step without injection (the median of the ratios of two
neighbouring steps): stage 2 at most 3 % more, on the median prompt, since a table costs the same for any places;
stage 1 at most 25 % more, on either prompt. And the injection (encoder, forward and backward, and the vectors put in
place) at least 20 times faster than token by token, on the median prompt: how much faster it is depends on how often
a place comes back, so the other prompt and one where none does are shown without a limit. The exit code is 1 if a
limit is missed.
"""
import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "data-preprocess")]

import torch  # noqa: E402

from ga_llm.base import artifacts, prompts  # noqa: E402
from ga_llm.llm import backbone  # noqa: E402
from ga_llm.pairs import sft_data  # noqa: E402
from ga_llm.training import common  # noqa: E402
from checkins import config as configs  # noqa: E402
from checkins import questions, samples  # noqa: E402
from geo_encoder import encoder, gps_tokens, injection  # noqa: E402

STAGE_2_MORE, STAGE_1_MORE, FASTER_THAN_BY_ITSELF = 0.03, 0.25, 20
PROMPTS = ("median places", "most places")


class ByItself(injection.Injection):
    """The same injection with one call of the encoder for each `<GPS n>`, however often its place was visited."""

    def forward(self, input_ids, embeddings):
        rows = self.rows[input_ids.clamp(max=len(self.rows) - 1)]
        is_place = (rows >= 0) & (input_ids < len(self.rows))
        vectors = torch.cat([self.encoder(self.features[row:row + 1]) for row in rows[is_place].tolist()])
        return embeddings.masked_scatter(is_place.unsqueeze(-1), vectors.to(embeddings.dtype))


def training_pairs(dataset: str, stage: int, fields: tuple[str, ...], wanted: int) -> list[str]:
    """The joined training pairs of `stage` with `wanted` GPS tokens that have the median and the most distinct places.
    """
    config = configs.load(artifacts.config_file(dataset))
    train = samples.load(config, "train")
    in_check_ins = wanted - (stage == 1)        # stage 1's question holds one more, the target's
    cut = []
    for pair in questions.pairs(config, train, train, None):
        spare = len(pair.history) + len(pair.current) - in_check_ins
        if 0 <= spare <= len(pair.history):
            cut.append(dataclasses.replace(pair, history=pair.history[spare:]))
    texts = questions.texts(train, fields)
    records = questions.records(config, stage, train, texts, train, texts, cut, samples.load_places(config))
    joined = sorted((prompts.join(record["question"], record["answer"]) for record in records), key=distinct_places)
    if not joined:
        raise SystemExit(f"{dataset}: no training question has {wanted} GPS tokens; give fewer with --gps_tokens")
    return [joined[len(joined) // 2], joined[-1]]


def distinct_places(pair: str) -> int:
    return len(set(prompts.GPS_TOKEN.findall(pair)))


class Side:
    """A model as one stage trains it, and its optimizer."""

    def __init__(self, args, length: int, stage: int, mapping, kind: type[injection.Injection] | None):
        """kind: how `<GPS n>` are injected; None: not at all."""
        tokenizer = backbone.load_tokenizer(args.model)
        attention = backbone.training_attention(use_flash=True, full=False)
        base = backbone.load_llm(args.model, length, attention, torch.bfloat16)
        token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, base)
        torch.manual_seed(0)
        self.injection = None
        if stage == 1:
            if kind:
                config = encoder.GeoEncoderConfig(base.get_input_embeddings().embedding_dim)
                usual = injection.new_gps_injection(config, mapping, token_ids, (256, 512))
                self.injection = kind(usual.encoder, usual.features, token_ids)
            self.model = common.for_stage_1(base, self.injection, 256, 512)
        else:
            if kind:
                injection.attach_untrained(base, mapping, token_ids)
            self.model = backbone.add_lora(base, 8, 16, dropout=0.1)
            backbone.train_by_name(self.model, "embed,norm")
            backbone.trainable_to_fp32(self.model)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-5, fused=True)

    def step(self, batch: dict) -> float:
        """Seconds of one training step."""
        return seconds(lambda: self._step(batch))

    def _step(self, batch: dict) -> None:
        with torch.autocast(self.model.device.type, torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(work) -> float:
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(rounds: int, *works) -> list[list[float]]:
    """Seconds of each of `works` in each round; every second round runs them in the opposite order."""
    times = [[] for _ in works]
    for turn in range(rounds):
        for i in range(len(works))[::-1 if turn % 2 else 1]:
            times[i].append(works[i]())
    return times


def compare_steps(stage: int, sides: list[Side], batches: list[dict], rounds: int) -> list[float]:
    """Print the steps of two sides, without and with injection, on each prompt; returns how much longer the second is.
    """
    without, with_ = sides
    in_turn(1, lambda: without.step(batches[0]), lambda: with_.step(batches[0]))       # warm up: AdamW's state
    ratios = []
    for name, batch in zip(PROMPTS, batches):
        plain, injected = in_turn(rounds, lambda: without.step(batch), lambda: with_.step(batch))
        ratios.append(statistics.median(b / a for a, b in zip(plain, injected)))
        row(f"stage {stage}, {name}: without injection", plain)
        row(f"stage {stage}, {name}: with injection", injected)
    return ratios


def compare_injections(together: injection.Injection, by_itself: ByItself, inputs: dict[str, torch.Tensor], embedding,
                       rounds: int) -> list[float]:
    """Print the injection alone, forward and backward, on each prompt; returns how many times faster `together` is."""
    factors = []
    for name, ids in inputs.items():
        with torch.no_grad():
            embeddings = torch.nn.functional.embedding(ids, embedding.weight)
        check_equal(together, by_itself, ids, embeddings)
        gradient = torch.randn_like(embeddings)

        def run(layer):
            with torch.autocast(ids.device.type, torch.bfloat16):
                injected = layer(ids, embeddings)
            injected.backward(gradient)
            layer.zero_grad()

        run(together)       # warm up
        ours, theirs = in_turn(rounds, lambda: seconds(lambda: run(together)), lambda: seconds(lambda: run(by_itself)))
        row(f"injection alone, {name}: distinct places once", ours)
        row(f"injection alone, {name}: each by itself", theirs)
        factors.append(statistics.median(theirs) / statistics.median(ours))
    return factors


@torch.no_grad()
def check_equal(together, by_itself, ids, embeddings) -> None:
    """Both put the same vectors in (in eval mode, fp32: dropout draws differ)."""
    for layer in (together, by_itself):
        layer.eval()
    torch.testing.assert_close(together(ids, embeddings.float()), by_itself(ids, embeddings.float()), rtol=1e-4,
                               atol=1e-4)
    for layer in (together, by_itself):
        layer.train()


def row(what: str, times: list[float]) -> None:
    print(f"{what:58}{len(times):7}{statistics.median(times):12.3f}{min(times):10.3f}{max(times):10.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-dataset_name", default="nyc")
    parser.add_argument("-fields", default="poi,gps")
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--gps_tokens", type=int, default=300, help="`<GPS n>` of each prompt")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side on each prompt")
    args = parser.parse_args()

    folder = artifacts.preprocessed(args.dataset_name)
    mapping = gps_tokens.read_gps_mapping(folder / artifacts.gps_mapping(args.dataset_name))
    tokenizer = backbone.load_tokenizer(args.model)
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping)
    collator = sft_data.AnswerCollator(tokenizer.pad_token_id)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = {}
    for stage in (1, 2):
        fields = questions.shown_fields(args.fields, prompts.STAGE_1_FIELDS if stage == 1 else prompts.FIELDS, stage)
        pairs = training_pairs(args.dataset_name, stage, fields, args.gps_tokens)
        items = [dict(zip(("input_ids", "answer_start"), sft_data.encode(tokenizer, pair))) for pair in pairs]
        batches[stage] = [{key: value.to(device) if torch.is_tensor(value) else value
                           for key, value in collator([item]).items()} for item in items]
        for name, pair, batch in zip(PROMPTS, pairs, batches[stage]):
            print(f"stage {stage}, {name}: {batch['input_ids'].shape[1]} tokens, "
                  f"{len(prompts.GPS_TOKEN.findall(pair))} GPS tokens of {distinct_places(pair)} distinct places")
    length = max(batch["input_ids"].shape[1] for stage in batches for batch in batches[stage])

    print(f"\n{'':58}{'times':>7}{'median s':>12}{'least':>10}{'most':>10}")
    stage_2 = compare_steps(2, [Side(args, length, 2, mapping, kind) for kind in (None, injection.Injection)],
                            batches[2][:1], args.rounds)      # a table's cost is the same for any places
    sides = [Side(args, length, 1, mapping, kind) for kind in (None, injection.Injection)]
    stage_1 = compare_steps(1, sides, batches[1], args.rounds)
    slow = Side(args, length, 1, mapping, ByItself)
    usual_step, slow_step = in_turn(1, lambda: sides[1].step(batches[1][0]), lambda: slow.step(batches[1][0]))
    row(f"stage 1, {PROMPTS[0]}: with injection, once more", usual_step)
    row(f"stage 1, {PROMPTS[0]}: each token by itself", slow_step)

    together, by_itself = sides[1].injection, slow.injection
    by_itself.encoder = together.encoder
    inputs = {name: batch["input_ids"] for name, batch in zip(PROMPTS, batches[1])}
    # What no prompt of NYC comes near: another place at every GPS token.
    different = inputs[PROMPTS[-1]].clone()
    places = torch.isin(different, torch.as_tensor(token_ids, device=device))
    different[places] = torch.as_tensor(token_ids[:int(places.sum())], device=device)
    faster = compare_injections(together, by_itself, {**inputs, "all different": different},
                                sides[1].model.get_input_embeddings(), args.rounds)

    print(f"\nstage 1, the whole step: {slow_step[0] / usual_step[0]:.2f} times faster than with each token by itself "
          "(no limit)")
    for name, factor in list(zip([*PROMPTS, "all different"], faster))[1:]:
        print(f"injection, {name}: {factor:.1f} times faster than by itself (no limit)")
    met = [limit(f"stage {stage}, {name}: step with injection", more - 1, f"{more - 1:+.1%}", bound, at_most=True)
           for stage, ratios, bound in ((2, stage_2, STAGE_2_MORE), (1, stage_1, STAGE_1_MORE))
           for name, more in zip(PROMPTS, ratios)]
    met.append(limit(f"injection, {PROMPTS[0]}", faster[0], f"{faster[0]:.1f} times faster than by itself",
                     FASTER_THAN_BY_ITSELF, at_most=False))
    sys.exit(not all(met))


def limit(what: str, value: float, shown: str, bound: float, at_most: bool) -> bool:
    met = value <= bound if at_most else value >= bound
    print(f"{what}: {shown} (limit: {f'{bound:+.0%} at most' if at_most else f'{bound} at least'}): "
          f"{'met' if met else 'missed'}")
    return met


if __name__ == "__main__":
    main()
