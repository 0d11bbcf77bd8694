"""--dry_run: all that training reads is checked, three steps are run, and what the days would cost is printed.

Nothing is written but the cache of tokens; --output_dir stays as it is.
"""
import dataclasses
import datetime
import logging
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import TrainerCallback

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.llm import backbone, plan
from ga_llm.pairs import sft_data
from ga_llm.training.batches import TokenBatches
from ga_llm.training.checkpoints import is_llms
from ga_llm.training.run_log import INPUT_FILES, RunLog

log = logging.getLogger(__name__)

GPUS = (1, 2, 4, 8)
LLAMA2_7B = plan.Model(hidden=4096, layers=32, heads=32, kv_heads=32, intermediate=11008, vocab=32000, head_dim=128)
MEASURED = 348e12       # FLOP/s of a stage-2 step at 8,192 tokens with S²-Attn: results/gpu/card
GIB = 2**30


@dataclasses.dataclass
class Work:
    """Micro-batches: FLOPs of each, those of them that activation checkpointing computes again, and its positions."""
    flops: np.ndarray
    again: np.ndarray
    positions: np.ndarray


def run(trainer, setup) -> None:
    """Check, measure, print. `trainer` is spent afterwards. Every process must call it; the first one prints."""
    first = trainer.is_world_process_zero()
    model, chosen = plan.Model.of(setup.model.config), describe_run(trainer, setup)
    if first:
        print(*describe_inputs(trainer.args, setup), sep="\n")
        print(f"trained    {backbone.describe_trainable(trainer.model)}")
    drawn = np.fromiter(trainer._get_train_sampler(), dtype=np.int64)
    epoch, tokens = work(setup, model, chosen, drawn), setup.train_dataset.lengths.sum()
    at_7b = work(setup, *like_7b(setup, chosen), drawn).flops.sum()
    max_steps = trainer.args.max_steps
    steps = measure(trainer)
    for step in steps:
        step.flops = work(setup, model, chosen, step.items[:chosen.batch]).flops[0]
    if first:
        print(*describe_steps(steps), *describe_epoch(trainer.args, epoch, tokens, steps, max_steps),
              f"           at Llama-2-7B's shape {at_7b:.3g} FLOPs: {_duration(at_7b / MEASURED)} an epoch at "
              f"{MEASURED / 1e12:.0f} TFLOP/s (one H200, docs/measured.md)",
              *describe_disk(trainer.args, chosen), *describe_memory(model, chosen), sep="\n")


def describe_inputs(args, setup) -> list[str]:
    """The files, the lengths, what truncation costs, the places."""
    dataset, names = setup.dataset, (*INPUT_FILES, "model_name_or_path")
    lines = [f"{'files' if name == names[0] else '':10} --{name} {getattr(args, name)}"
             for name in names if getattr(args, name, None)]
    if setup.eval_dataset is not None:
        lines.append(f"validation {setup.eval_dataset.lengths.sum():,} tokens an evaluation, with padding")
    tokens = dataset.tokens
    lines.append(f"pairs      {len(dataset):,}; tokens {tokens.sum():,} in all, {tokens.min():,} to {tokens.max():,} a "
                 f"pair, median {int(np.median(tokens)):,}")
    cut = tokens > dataset.lengths
    named, lost, places = 0, 0, set()
    for i, pair in enumerate(sft_data.iterate_pairs(args.data_path)):
        places.update(prompts.GPS_TOKEN.findall(pair), prompts.POI_TOKEN.findall(pair))
        if cut[i]:
            prompt, answer = prompts.split(pair)
            if names_target(prompt, answer):
                item = dataset[i]
                kept = setup.tokenizer.decode(item["input_ids"][:item["answer_start"]])
                named += 1
                lost += not names_target(kept, answer)
    lines.append(f"truncated  {cut.sum():,} pairs ({cut.mean():.1%}) have more than --model_max_length "
                 f"{args.model_max_length:,} tokens and lose their oldest check-ins")
    if cut.any():
        lines.append(f"           {named:,} of them name the target's place before they ask; {lost:,} of these lose it")
    lines.append(f"places     {len(places):,} of the mapping's {len(setup.mapping.ids):,} occur; none is without a row")
    return lines


def names_target(prompt: str, answer: str) -> bool:
    """Whether the place that is asked for stands in the prompt, before the question asks."""
    ids = prompts.POI_ID.findall(answer)
    if not ids:     # stage 1 asks for the coordinates of the prompt's last place
        asked = list(prompts.GPS_TOKEN.finditer(prompt))
        if not asked:
            return False
        ids, prompt = [asked[-1][1]], prompt[:asked[-1].start()]
    return any(ids[-1] in pattern.findall(prompt) for pattern in (prompts.POI_ID, prompts.GPS_TOKEN))


def describe_run(trainer, setup) -> plan.Run:
    """The run that the flags ask for, at the length of its longest sequence, on as many GPUs as there are processes."""
    args, own, beside = trainer.args, 0, 0
    hidden = setup.model.get_input_embeddings().embedding_dim
    # Stage 2's encoders are tables of their vectors.
    tables = sum(bool(getattr(args, name, None)) for name in ("geoencoder_path", "projector_path"))
    frozen = tables * len(setup.token_ids) * hidden * 2
    norms = False
    for name, parameter in trainer.model.named_parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        is_own = "lora_" not in name and is_llms(name)
        if parameter.requires_grad:
            own, beside = own + count * is_own, beside + count * (not is_own)
            norms |= is_own and "norm" in name
        elif not is_llms(name):
            frozen += count * parameter.element_size()
    stage = args.hf_deepspeed_config.get_value("zero_optimization", {}).get("stage", 0) if args.deepspeed else 0
    if trainer.is_fsdp_enabled:
        log.info("FSDP is planned as ZeRO-3, which also shares out everything")
        stage = 3
    return plan.Run(
        length=int(trainer.train_dataset.lengths.max()), batch=args.per_device_train_batch_size,
        answer=int((setup.dataset.lengths - setup.dataset.answer_starts + 1).max()), trained_own=own,
        trained_beside=beside, frozen_beside=frozen, lora_rank=args.lora_r if args.low_rank_training else 0,
        lora_dropout=getattr(args, "lora_dropout", 0.0) > 0,
        embeddings_trained=setup.model.get_input_embeddings().weight.requires_grad, norms_trained=norms,
        four_bit=getattr(setup.model, "is_loaded_in_4bit", False), bf16=args.bf16 or args.fp16,
        full_attention=args.use_full_attn or args.shared_prefix, checkpointing=args.activation_checkpointing,
        zero_stage=stage, gpus=args.world_size, **pointed(trainer))


def pointed(trainer) -> dict:
    """What `plan.Run` says of the pointer, of the batch with the longest sequences; nothing without one."""
    args, dataset = trainer.args, trainer.train_dataset
    if not getattr(args, "pointer", False):
        return {}
    lengths = dataset.lengths
    if isinstance(dataset, TokenBatches):       # all of about as many tokens: the fewer pairs, the longer they are
        lengths = -np.array([len(some) for some in dataset.members])
    longest = np.argsort(lengths, kind="stable")[-args.per_device_train_batch_size:]
    given = trainer.data_collator([dataset[i] for i in longest.tolist()])["pointer"]
    return {"pointer_heads": args.pointer_heads, "pointed": (*given["query"].shape, given["place"].shape[1])}


def like_7b(setup, chosen: plan.Run) -> tuple[plan.Model, plan.Run]:
    """Llama-2-7B in the place of the model, trained by the paper's LoRA."""
    model = dataclasses.replace(LLAMA2_7B, vocab=LLAMA2_7B.vocab + len(setup.token_ids))
    return model, dataclasses.replace(chosen, lora_rank=8, checkpointing=True)


def work(setup, model: plan.Model, chosen: plan.Run, items: np.ndarray) -> Work:
    """What training on these items of the training data takes, in this order, `chosen.batch` at once."""
    dataset, pairs = setup.train_dataset, setup.dataset
    answers = pairs.lengths - pairs.answer_starts + 1
    if isinstance(dataset, TokenBatches):
        members = [dataset.members[i] for i in items]
        positions, answer = dataset.lengths[items], np.array([len(some) * answers[some].max() for some in members])
        attended = np.array([len(some) * plan.attended_pairs(int(pairs.lengths[some].max()), model.heads,
                                                             chosen.full_attention) for some in members])
    elif dataset is pairs:
        lengths = plan.padded(pairs.lengths[items], chosen.batch)
        positions, answer = lengths * chosen.batch, plan.padded(answers[items], chosen.batch) * chosen.batch
        attended = chosen.batch * np.array([plan.attended_pairs(length, model.heads, chosen.full_attention)
                                            for length in lengths.tolist()])
    else:   # trees, which lie side by side without padding
        trees = [(tree, range(tree.first, tree.first + len(tree.shared))) for tree in dataset.trees]
        of_each = (dataset.lengths, [answers[part.start:part.stop].sum() for _, part in trees],
                   [plan.tree_pairs(tree.shared, pairs.lengths[part.start:part.stop].tolist(), model.heads)
                    for tree, part in trees])
        starts = np.arange(0, len(items), chosen.batch)
        positions, answer, attended = (np.add.reduceat(np.array(each)[items], starts) for each in of_each)
    flops = plan.flops(model, chosen, positions.astype(float), attended.astype(float), answer)
    return Work(sum(flops.values()), flops["again"], positions)


@dataclasses.dataclass
class Step:
    """A measured step of one micro-batch: which items all processes had, seconds of its passes and its optimizer.

    DeepSpeed's optimizer steps within the backward pass.
    """
    length: int             # tokens of its longest sequence
    items: np.ndarray
    flops: float = 0.0      # of one process
    passes: float = 0.0
    optimizer: float = 0.0
    peak_memory: int = 0    # bytes, on a GPU


class _Stopwatch(TrainerCallback):
    def __init__(self, steps: list[Step]):
        self.steps, self.at = steps, 0

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = self._now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.passed = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        step = self.steps[self.at]
        step.passes, step.optimizer = self.passed - self.began, self._now() - self.passed
        if torch.cuda.is_available():
            step.peak_memory = torch.cuda.max_memory_allocated()
        self.at += 1


def measure(trainer) -> list[Step]:
    """Train three steps, the first to warm up: at the median length, there again, and at the longest."""
    lengths, args = trainer.train_dataset.lengths, trainer.args
    by_length = np.argsort(lengths, kind="stable")
    size = args.world_size * args.per_device_train_batch_size
    middle = max(0, min((len(lengths) - size) // 2, len(lengths) - size))
    typical, longest = (np.resize(part, size) for part in (by_length[middle:middle + size], by_length[-size:]))
    steps = [Step(int(lengths[items].max()), items) for items in (typical, typical, longest)]
    trainer.train_dataset = Subset(trainer.train_dataset, np.concatenate([step.items for step in steps]).tolist())
    args.train_sampling_strategy, args.max_steps = "sequential", len(steps)
    trainer.remove_callback(RunLog)
    trainer.add_callback(_Stopwatch(steps))
    log.info("three steps, at %d, %d and %d tokens", *(step.length for step in steps))
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise UserError(f"a step does not fit this GPU ({str(error).splitlines()[0]}); lower --model_max_length or "
                        "--per_device_train_batch_size, or take ZeRO-3, 4 bits, activation checkpointing") from None
    return steps[1:]


def describe_steps(steps: list[Step]) -> list[str]:
    lines = []
    for name, step in zip(("median", "longest"), steps):
        lines.append(f"{'' if lines else 'step':10} {name} length, {step.length:,} tokens: {step.passes:.3g} s forward "
                     f"and backward ({step.flops / step.passes / 1e12:.3g} TFLOP/s), {step.optimizer:.3g} s optimizer")
    if steps[-1].peak_memory:
        lines.append(f"           peak memory on this GPU {steps[-1].peak_memory / GIB:.1f} GiB")
    return lines


def describe_epoch(args, epoch: Work, tokens: int, steps: list[Step], max_steps: int) -> list[str]:
    """Tokens, FLOPs, and the time that the measured steps foretell, on as many processes."""
    count = math.ceil(len(epoch.flops) / args.world_size / args.planned_accumulation_steps)
    seconds = plan.seconds(epoch.flops, [(step.flops, step.passes) for step in steps]).sum() / args.world_size
    seconds += count * np.mean([step.optimizer for step in steps])
    epochs = max_steps / count if max_steps > 0 else args.num_train_epochs
    return [f"epoch      {tokens:,} tokens, and {1 - tokens / epoch.positions.sum():.1%} padding",
            f"           {epoch.flops.sum():.3g} FLOPs, of which {epoch.again.sum() / epoch.flops.sum():.0%} are "
            "computed again for activation checkpointing",
            f"           {count:,} optimizer steps on {args.world_size} process(es): {_duration(seconds)}; "
            f"all {epochs:.3g} epochs: {_duration(seconds * epochs)}"]


def describe_disk(args, chosen: plan.Run) -> list[str]:
    folder = Path(args.planned_output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    return [f"checkpoint {plan.checkpoint_bytes(chosen) / GIB:.3g} GiB each; at --output_dir "
            f"{shutil.disk_usage(folder).free / GIB:.0f} GiB are free"]


def describe_memory(model: plan.Model, chosen: plan.Run) -> list[str]:
    """The table of expected memory, a column for each number of GPUs."""
    numbers = sorted({*GPUS, chosen.gpus})
    columns = [plan.memory(model, dataclasses.replace(chosen, gpus=n)) for n in numbers]
    unit, size = ("GiB", GIB) if columns[0]["total"] > GIB / 4 else ("MiB", 2**20)
    kind = "NF4" if chosen.four_bit else "bf16" if chosen.bf16 else "fp32"
    how = ", ".join([
        f"{model.parameters / 1e6:,.2f} M parameters in {kind}",
        f"batch {chosen.batch} of {chosen.length:,} tokens", "full attention" if chosen.full_attention else "S²-Attn",
        f"ZeRO-{chosen.zero_stage}" if chosen.zero_stage else "no ZeRO",
        f"activations {'checkpointed' if chosen.checkpointing else 'all kept'}"])
    if chosen.pointer_heads:
        how += ", a pointer of {} prompts that ask for {} places among {} check-ins".format(*chosen.pointed)
    lines = [f"memory     {unit} expected on each of N GPUs: {how}",
             f"           {'':26}" + "".join(f"{f'N = {n}':>10}" for n in numbers)]
    for part in columns[0]:
        lines.append(f"           {part:26}" + "".join(f"{column[part] / size:10.2f}" for column in columns))
    return lines


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
