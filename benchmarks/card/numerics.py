"""The card computes what a CPU computes: attention, trees, ranking, NF4, injection, and a run that is resumed."""
import copy
import functools
import unittest.mock

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama
from transformers.utils import is_liger_kernel_available

from card import shape
from card.chain import Chain
from card.record import wait
from ga_llm.base.reading import read_tensors
from ga_llm.evaluation import ranking
from ga_llm.llm import backbone, pointing, shared_prefix, shifted_attention
from ga_llm.llm.pointer import Pointer, PointerConfig
from ga_llm.llm.right_padding import RIGHT_PADDED
from ga_llm.llm.shared_prefix import SHARED_PREFIX
from ga_llm.llm.shifted_attention import SHIFTED_SPARSE
from ga_llm.llm.tree_attention import TREE
from ga_llm.pairs import sft_data
from ga_llm.pairs.spelling import TestPrompt
from geo_encoder import encoder, injection
from geo_encoder.gps_tokens import GPSMapping
from pointer import check_in_pairs

PART = "numerics"
LIMITS = {"fp32": 1e-3, "bf16": 3e-2}       # ‖ours − reference‖ / ‖reference‖, the reference in fp32 on the CPU
LENGTH, TOY_LENGTH = 4096, 512     # S²-Attn's groups are a quarter of it
WORDS, PLACES = 500, 300


def run(record, args) -> None:
    attentions(record, args.device, TOY_LENGTH if args.toy else LENGTH)
    pointed(record, args.device)
    rank(record, args.device)
    flash(record, args.device)
    liger(record, args.device)
    nf4(record, args.device)
    inject(record, args.device)
    resume(record, args)


@functools.cache
def model(attention: str) -> LlamaForCausalLM:
    """A small random Llama with grouped queries, fp32, on the CPU; the same weights whatever its attention."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=128, max_position_embeddings=LENGTH,
                         bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.05)
    config._attn_implementation = attention
    return LlamaForCausalLM(config).float()


class Pairs:
    """Pairs of random tokens that begin alike; a data set as TreeDataset takes it."""

    def __init__(self, lengths, shared: int):
        random = np.random.default_rng(0)
        begin = random.integers(3, WORDS, shared)
        self.ids = [np.concatenate([begin, random.integers(3, WORDS, n - shared)]) for n in lengths]
        self.lengths = np.array(lengths)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "answer_start": len(self.ids[i]) - 20}


def attentions(record, device: str, length: int) -> None:
    """The loss and the gradient of a training step, whatever the attention."""
    pairs = Pairs([length, length - length // 16], shared=3 * length // 4)
    padded = sft_data.AnswerCollator(0)([pairs[0], pairs[1]])
    trees = shared_prefix.TreeDataset(pairs, 2 * length)
    tree = shared_prefix.TreeCollator()([trees[i] for i in range(len(trees))])
    for name, attention, batch in (("S²-Attn", SHIFTED_SPARSE, padded), ("full attention", RIGHT_PADDED, padded),
                                   ("trees", SHARED_PREFIX, tree)):
        loss, gradient = step(model(attention), batch, "cpu", torch.float32)
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            own_loss, own = step(model(attention), batch, device, dtype)
            record.add(PART, f"{name}, {kind}: loss", abs(own_loss / loss - 1), most=LIMITS[kind])
            record.add(PART, f"{name}, {kind}: gradient", error(own, gradient), most=LIMITS[kind])


def pointed(record, device: str) -> None:
    """The loss and the gradient of a training step with the pointer; weights that begin at zero are drawn, too."""
    draw = np.random.default_rng(1)
    mapping = GPSMapping(np.arange(PLACES), 40 + draw.random(PLACES), -74 + draw.random(PLACES))
    own = copy.deepcopy(model(RIGHT_PADDED))
    own.resize_token_embeddings(WORDS + PLACES)
    torch.manual_seed(0)
    made = Pointer(PointerConfig(own.config.hidden_size), mapping)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=.1)
    pointing.attach(own, made)
    batch = pointing.PointedCollator(sft_data.AnswerCollator(0), PLACES)(check_in_pairs(4, 128, WORDS, PLACES))
    loss, gradient = step(own, batch, "cpu", torch.float32)
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        own_loss, found = step(own, batch, device, dtype)
        record.add(PART, f"pointer, {kind}: loss", abs(own_loss / loss - 1), most=LIMITS[kind])
        record.add(PART, f"pointer, {kind}: gradient", error(found, gradient), most=LIMITS[kind])


def step(reference, batch: dict, device: str, dtype: torch.dtype):
    """Loss and gradient, (parameters,) fp32 on the CPU, of a copy on the device, under autocast as in training."""
    own = copy.deepcopy(reference).to(device).train()
    batch = send_to_device(batch, device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = own(**batch).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float().cpu() for p in own.parameters()])


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    found, reference = found.double().cpu(), reference.double().cpu()
    return ((found - reference).norm() / reference.norm()).item()


def rank(record, device: str) -> None:
    """log P of every candidate, of prompts that share a beginning."""
    random = np.random.default_rng(1)
    begin = random.integers(30, WORDS, 1000).tolist()
    prompts = [TestPrompt(i, "", i, begin + random.integers(30, WORDS, 40 + i).tolist(), 1040 + i, True)
               for i in range(4)]
    trie = ranking.Trie({poi: [10 + int(digit) for digit in str(poi)] + [20] for poi in range(1000)})

    def table(device, dtype):
        own = copy.deepcopy(model(TREE)).to(device, dtype).eval()
        found = {}
        for group in ranking.plan(prompts, 4):
            for chunk, results in ranking.rank(own, trie, group, full=True):
                found |= {prompt.pair: result for prompt, result in zip(chunk, results)}
        return np.stack([found[i].log_probs for i in range(len(prompts))])

    reference = table("cpu", torch.float32)
    for kind, dtype, most in (("fp32", torch.float32, 1e-3), ("bf16", torch.bfloat16, 0.2)):
        off = np.abs(table(device, dtype) - reference).max()
        record.add(PART, f"exact ranking, {kind}: log P, furthest off of 4 x 1,000", float(off), "nat", most=most)


def flash(record, device: str) -> None:
    """flash-attn's path of S²-Attn against SDPA's."""
    if not backbone.flash_attention_available():
        return record.note(PART, "S²-Attn through flash-attn", "not installed: SDPA serves")
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 8, LENGTH, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    bounds = shifted_attention.group_bounds(LENGTH, LENGTH // 4, LENGTH // 8)
    options = {"mask": None, "scale": None, "dropout": 0.0, "window": None}
    ours, sdpa = (attend(query, key, value, bounds, **options) for attend in
                  (shifted_attention._attend_flash, shifted_attention._attend_sdpa))
    record.add(PART, "S²-Attn through flash-attn against SDPA, bf16", error(ours, sdpa), most=1e-2)


def liger(record, device: str) -> None:
    """--use_liger_kernel: the gradient of a training step."""
    if device == "cpu" or not is_liger_kernel_available():
        return record.note(PART, "Liger kernels", "for GPUs" if device == "cpu" else "liger-kernel is not installed")
    batch = sft_data.AnswerCollator(0)([Pairs([LENGTH], shared=0)[0]])
    _, gradient = step(model("sdpa"), batch, "cpu", torch.float32)
    own = copy.deepcopy(model("sdpa"))
    with unittest.mock.patch.object(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb):
        apply_liger_kernel(own, {"fused_linear_cross_entropy": False})      # replaces that, too
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            _, found = step(own, batch, device, dtype)
            record.add(PART, f"Liger kernels, {kind}: gradient", error(found, gradient), most=LIMITS[kind])


@torch.no_grad()
def nf4(record, device: str) -> None:
    """A linear map in NF4 against its dequantized weights."""
    if not shape.has_bitsandbytes():
        return record.note(PART, "NF4", "bitsandbytes is not installed")
    import bitsandbytes as bnb
    torch.manual_seed(0)
    layer = shape._quantized(torch.nn.Linear(1024, 512, bias=False), device)
    x = torch.randn(64, 1024, device=device, dtype=torch.bfloat16)
    whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    record.add(PART, "NF4 forward against its dequantized weights", error(layer(x), x.float() @ whole.T), most=1e-2)


def inject(record, device: str) -> None:
    """Vectors of the places and the encoder's gradient, as the LLM sees them, of each kind of encoder."""
    mapping, token_ids = shape.places(toy=True)
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, token_ids[-1] + 1, (2, 200)))
    for kind in encoder.KINDS:
        found = {}
        for where in ("cpu", device):
            torch.manual_seed(0)
            made = encoder.build_encoder(encoder.GeoEncoderConfig(128, kind)).eval()
            layer = injection.gps_injection(made, encoder.LEVEL, mapping, token_ids).to(where)
            embeddings = torch.randn(2, 200, 128, generator=torch.Generator().manual_seed(3)).to(where)
            out = layer(ids.to(where), embeddings)
            out.square().sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
            layer.freeze(torch.float32)
            found[where] = out.detach(), gradient, layer(ids.to(where), embeddings)
        for name, own, reference in zip(("vectors", "gradient", "table"), found[device], found["cpu"]):
            record.add(PART, f"injection, {kind}: {name}, fp32", error(own, reference), most=LIMITS["fp32"])


def resume(record, args) -> None:
    """Six steps of stage 2 at once, and three of them again from checkpoint 3: the difference of what is trained."""
    chain = Chain(args.output_dir / "resume", args.device)
    chain.sample_city()
    data = chain.folder / "datasets/sample/preprocessed"
    runs = chain.new_runs()
    flags = ["--model_name_or_path", chain.tiny_llama(), "--gps_mapping_path", data / "sample_gps_mapping.csv",
             "--data_path", data / "train_qa_pairs_kqt_200items_sample_llm_without_sim_gps.json",
             "--model_max_length", 1024, "--bf16", True, "--load_in_4bit", False, "--max_steps", 6, "--save_steps", 3,
             "--per_device_train_batch_size", 2, "--learning_rate", 1e-3, "--logging_steps", 3]
    chain.start("finetune_LLM_with_GCIM.py", *flags, "--output_dir", runs / "whole")
    chain.start("finetune_LLM_with_GCIM.py", *flags, "--output_dir", runs / "again",
                "--resume_from_checkpoint", runs / "whole/checkpoint-3")
    wait(args.device)
    furthest = 0.0
    for name in ("adapter_model.safetensors", "trainable_params.safetensors"):
        whole, again = (read_tensors(runs / run / "checkpoint-6" / name) for run in ("whole", "again"))
        furthest = max(furthest, *((whole[key] - again[key]).abs().max().item() for key in whole))
    record.add(PART, "resumed run: furthest weight from the whole run's (0: bitwise)", furthest, most=1e-4)
