"""A step of stage 2 at Llama-2-7B's shape: tokens/s, TFLOP/s, memory; beside the same step written plainly."""
import contextlib
import dataclasses
import statistics
import unittest.mock

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama

from card import shape
from card.chain import Chain
from card.record import free, median_time, timed
from checkins import config as configs
from checkins import questions, samples
from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.llm import backbone, plan
from ga_llm.llm.shifted_attention import SHIFTED_SPARSE
from ga_llm.pairs.sft_data import IGNORED
from geo_encoder import injection

PART = "llama7b"
GIB = 2**30
ANSWER = 60                 # tokens of an answer
TOKENS_A_CHECK_IN = 68.2    # Llama-2's, of our full wording
GOAL, MEMORY_OFF, MEMORY_MOST = 0.45, 0.10, 40 * 1e9 / GIB
STEPS = 3
RANK = 8
ROTATE = modeling_llama.apply_rotary_pos_emb
NAMES = {SHIFTED_SPARSE: "S²-Attn", "sdpa": "full attention"}


def run(record, args) -> None:
    device, four_bit = args.device, args.four_bit and shape.has_bitsandbytes()
    if args.four_bit and not four_bit:
        record.note(PART, "base in bf16", "bitsandbytes is not installed")
    lengths = (256, 512) if args.toy else (8192, 32768)
    peak = measured_peak(device, 256 if args.toy else 8192)
    record.add(PART, "bf16 matrix product, random data", peak / 1e12, "TFLOP/s")
    steps = {}
    for attention in NAMES:
        model = ours(attention, lengths[-1], args, four_bit)
        for length in lengths:
            if record.left > 0:
                steps[attention, length] = measure(record, args, model, attention, length, peak)
        del model
        free(device)
    if record.left > 0:
        compare(record, args, four_bit, lengths[0], peak)
    days(record, args, steps, lengths)


def measured_peak(device: str, size: int) -> float:
    """FLOP/s of a bf16 matrix product."""
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / median_time(device, lambda: one @ other, 10)


def ours(attention: str, length: int, args, four_bit: bool):
    """The model as finetune_LLM_with_GCIM.py trains it: places from a table, LoRA, embeddings and norms in fp32."""
    torch.manual_seed(0)
    base = shape.draw(shape.config(args.toy, length), args.device, attention, four_bit)
    backbone.round_norms(base)
    model = backbone.add_lora(base, RANK, 2 * RANK, dropout=0.1)
    backbone.train_by_name(model, "embed,norm")
    with torch.device(args.device):
        injection.attach_untrained(base, *shape.places(args.toy))
    backbone.trainable_to_fp32(model)
    backbone.prepare_for_autocast(model)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def plain(length: int, args, four_bit: bool):
    """The same, as one writes it with transformers and PEFT: full attention, logits of all tokens, no injection."""
    torch.manual_seed(0)
    base = shape.draw(shape.config(args.toy, length), args.device, "sdpa", four_bit)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.1, bias="none",
                                            task_type="CAUSAL_LM", target_modules=backbone.LORA_TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_" in name or any(part in name for part in ("embed", "norm")):
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


class Step:
    """Forward, backward, clipping and AdamW under bf16 autocast, as the Trainer does them."""

    def __init__(self, model, device: str):
        self.model, self.device = model, device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-5, fused=True)

    def __call__(self, batch: dict) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def batch(args, length: int, all_logits: bool = False) -> dict:
    """A pair of random tokens, a tenth of them places, the loss on its answer; as sft_data.AnswerCollator makes it."""
    generator = torch.Generator().manual_seed(1)
    places = torch.from_numpy(shape.places(args.toy)[1])
    ids = torch.randint(3, int(places[0]), (1, length), generator=generator)
    at = torch.randperm(length - ANSWER, generator=generator)[:length // 10]
    ids[0, at] = places[torch.randint(len(places), (len(at),), generator=generator)]
    if all_logits:
        labels = torch.full_like(ids, IGNORED)
        labels[0, -ANSWER:] = ids[0, -ANSWER:]
        made = {"labels": labels}
    else:
        answer = torch.cat([ids[0, -ANSWER:], torch.tensor([IGNORED])])[None]
        made = {"labels": answer, "shift_labels": answer, "logits_to_keep": ANSWER + 1}
    made |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {key: value.to(args.device) if torch.is_tensor(value) else value for key, value in made.items()}


def planned(model, args, attention: str, length: int) -> tuple[plan.Model, plan.Run]:
    """What --dry_run expects of this step."""
    size = plan.Model.of(model.config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    beside = size.layers * plan.lora_parameters(size, RANK)
    return size, plan.Run(
        length=length, batch=1, answer=ANSWER + 1, trained_own=trained - beside, trained_beside=beside,
        frozen_beside=len(shape.places(args.toy)[1]) * size.hidden * plan.BF16, lora_rank=RANK, lora_dropout=True,
        four_bit=model.get_base_model().is_loaded_in_4bit, bf16=True, full_attention=attention != SHIFTED_SPARSE)


@dataclasses.dataclass
class Measured:
    seconds: float
    flops: float


def measure(record, args, model, attention: str, length: int, peak: float) -> Measured:
    """Time the step, and compare speed and memory with the plan's."""
    size, chosen = planned(model, args, attention, length)
    step, inputs = Step(model, args.device), batch(args, length)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_time(args.device, lambda: step(inputs), STEPS)
    work = flops(size, chosen)
    total, useful = sum(work.values()), work["forward"] + work["backward"]
    where = f"{length:,} tokens, {NAMES[attention]}"
    record.add(PART, f"{where}: tokens/s", length / seconds, "tokens/s")
    record.add(PART, f"{where}: with what is computed again", total / seconds / 1e12, "TFLOP/s")
    record.add(PART, f"{where}: share of the measured peak", total / seconds / peak)
    record.add(PART, f"{where}: share without what is computed again", useful / seconds / peak)
    if args.device == "cuda":
        found, expected = torch.cuda.max_memory_allocated(), plan.memory(size, chosen)["total"]
        limit = {"most": MEMORY_MOST} if length == 32768 else {}
        record.add(PART, f"{where}: peak memory", found / GIB, "GiB", **limit)
        record.add(PART, f"{where}: the plan's memory is off by", abs(expected / found - 1), most=MEMORY_OFF)
    return Measured(seconds, total)


def flops(size: plan.Model, chosen: plan.Run) -> dict[str, float]:
    pairs = plan.attended_pairs(chosen.length, size.heads, chosen.full_attention)
    return plan.flops(size, chosen, chosen.length, pairs, chosen.answer)


def compare(record, args, four_bit: bool, length: int, peak: float) -> None:
    """Steps of ours, in turn with the same step written plainly."""
    theirs, all_logits = Step(plain(length, args, four_bit), args.device), batch(args, length, all_logits=True)
    inputs, shares = batch(args, length), {}
    speeds = []
    for attention, variant in [("sdpa", ""), *((SHIFTED_SPARSE, variant) for variant in ("", *args.variants))]:
        name = NAMES[attention] + (f" + {variant}" if variant else "")
        if record.left <= 0:
            record.note(PART, f"{name}, in turn with a plain step", "no minutes left")
            continue
        model = ours(attention, length, args, four_bit)
        if "compile" in variant:
            backbone.compile_layers(model)
        if "liger" in variant:
            apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
        rotate, modeling_llama.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb, ROTATE
        step, chosen = Step(model, args.device), planned(model, args, attention, length)

        def with_own_rotation(step=step, rotate=rotate):        # Liger replaces it for all models
            with unittest.mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotate):
                step(inputs)

        own, other = in_turn(args.device, STEPS, with_own_rotation, lambda: theirs(all_logits))
        speeds += other
        shares[name] = sum(flops(*chosen).values()) / statistics.median(own) / peak
        where = f"{length:,} tokens, {name}"
        record.add(PART, f"{where}: tokens/s in turn", length / statistics.median(own), "tokens/s")
        record.add(PART, f"{where}: share of the measured peak", shares[name])
        record.add(PART, f"{where}: against a plain step", statistics.median(b / a for a, b in zip(own, other)),
                   "times", **({} if args.toy else {"least": 1}))
        if args.profile:
            profile(record, with_own_rotation, name.replace(" ", ""))
        del model, step, with_own_rotation
        free(args.device)
    record.add(PART, f"{length:,} tokens, written plainly: tokens/s", length / statistics.median(speeds), "tokens/s")
    if args.profile:
        profile(record, lambda: theirs(all_logits), "plain")
    if shares:
        record.add(PART, f"{length:,} tokens, the fastest of these: share of the peak", max(shares.values()),
                   **({} if args.toy else {"least": GOAL}))


def in_turn(device: str, rounds: int, *works) -> list[list[float]]:
    """Seconds of each of `works` in each round, after one round that is not counted."""
    times = [[] for _ in works]
    for _ in range(rounds + 1):
        for taken, work in zip(times, works):
            taken.append(timed(device, work))
    return [taken[1:] for taken in times]


def profile(record, work, name: str) -> None:
    """Which kernels a step spends its time in."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as found:
        work()
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90)
    (record.folder / f"profile_{name}.txt").write_text(table)


def days(record, args, steps: dict, lengths) -> None:
    """Three epochs of the data set on one such card, by its pairs' check-ins and the two steps measured."""
    chain, dataset = Chain(args.output_dir / "real", args.device), "sample" if args.toy else args.dataset_name
    try:
        chain.sample_city() if args.toy else chain.samples(dataset)
    except UserError as error:
        return record.note(PART, "days of three epochs", str(error))
    with contextlib.chdir(chain.folder):
        config = configs.load(artifacts.config_file(dataset))
        train = samples.load(config, "train")
    counts = np.array([len(pair.history) + len(pair.current) for pair in questions.pairs(config, train, train, None)])
    tokens = np.minimum((counts + 1) * TOKENS_A_CHECK_IN + ANSWER, lengths[-1]).astype(int)
    size = plan.Model.of(shape.config(args.toy, lengths[-1]))
    for attention, name in ((SHIFTED_SPARSE, "S²-Attn"), ("sdpa", "full attention")):
        measured = [steps.get((attention, length)) for length in lengths]
        if None in measured:
            continue
        full = attention != SHIFTED_SPARSE
        chosen = plan.Run(length=lengths[-1], batch=1, answer=ANSWER + 1, trained_own=size.embedding,
                          trained_beside=0, lora_rank=RANK, bf16=True, full_attention=full)
        pairs = np.array([plan.attended_pairs(length, size.heads, full) for length in tokens.tolist()], dtype=float)
        work = sum(plan.flops(size, chosen, tokens.astype(float), pairs, ANSWER + 1).values())
        seconds = plan.seconds(work, [(step.flops, step.seconds) for step in measured]).sum()
        record.add(PART, f"three epochs of {dataset}, {len(counts):,} pairs, {name}", 3 * seconds / 86400, "days")
