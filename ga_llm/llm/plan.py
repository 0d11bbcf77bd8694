"""What a training run costs: memory by part and floating-point operations, from the model's shape, without weights.

Bytes are those of a GPU: one process, PyTorch's own kernels, no fragmentation and no CUDA context (about 1 GiB more).
FLOPs are those of matrix products, two for a multiplication and an addition; what is elementwise is not counted, nor
the geo-encoder (in stage 2 it is a table; in stage 1 under one per cent). Sliding windows count as full attention.

Sources: the count of saved tensors is transformers' Llama read line by line, as Korthikanti et al. (arXiv 2205.05198,
Section 4) do it for GPT; ZeRO's shares: Rajbhandari et al. (arXiv 1910.02054, Section 3 and 5); NF4 with double
quantization: Dettmers et al. (arXiv 2305.14314, Section 3); attention: Dao (arXiv 2307.08691, Section 4.1).
"""
import dataclasses
import functools

import numpy as np

from ga_llm.llm.shifted_attention import group_bounds, group_size

# 4 bits, an 8-bit scale for every 64 weights, an fp32 scale for every 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
FP32, BF16 = 4, 2
ADAM = 2 * FP32                 # two moments
ATTENTION_BACKWARD = 2.5        # five products to the forward pass's two: the scores are computed again
BUCKET = 500_000_000            # DeepSpeed's reduce_bucket_size and its limit of gathered parameters, both by default
LIVE_PARAMETERS = 1_000_000_000


# The pointer's bytes, measured, for it is a chain of small steps (tests/ga_llm/llm/test_plan.py): of each two check-ins
# of a prompt, while these are compared; in the backward pass of each place that is asked for and check-in, and by head.
POINTER = {FP32: (46, 290, 29.3), BF16: (29, 228, 28.8)}


@dataclasses.dataclass(frozen=True)
class Model:
    """The shape of a Llama-like LLM; vocab with its `<GPS n>`.

    layer_vectors: a layer's parameters that are no matrices, beside its two norms: biases, norms of queries and keys.
    """
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    head_dim: int
    tied: bool = False
    layer_vectors: int = 0

    @classmethod
    def of(cls, config) -> "Model":
        """From a transformers configuration of the Llama, Mistral, Qwen2 or Qwen3 family."""
        heads = config.num_attention_heads
        model = cls(config.hidden_size, config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", heads),
                    config.intermediate_size, config.vocab_size,
                    getattr(config, "head_dim", None) or config.hidden_size // heads, config.tie_word_embeddings)
        vectors = 0
        if config.model_type == "qwen2" or getattr(config, "attention_bias", False):    # Qwen2's are not in its config
            vectors += model.query + 2 * model.key
        if getattr(config, "attention_bias", False):
            vectors += model.hidden
        if getattr(config, "mlp_bias", False):
            vectors += 2 * model.intermediate + model.hidden
        if config.model_type == "qwen3":
            vectors += 2 * model.head_dim
        return dataclasses.replace(model, layer_vectors=vectors)

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_linear(self) -> int:
        """Weights of one layer's linear maps: q, k, v, o, gate, up, down."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @property
    def linear(self) -> int:
        return self.layers * self.layer_linear

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        vectors = self.layers * (2 * self.hidden + self.layer_vectors) + self.hidden
        return self.linear + vectors + self.embedding * (1 if self.tied else 2)


@dataclasses.dataclass(frozen=True)
class Run:
    """How a model is trained.

    length: tokens of a sequence; batch: sequences at once on one GPU; answer: positions of each with logits.
    trained_own: parameters of the LLM itself that are trained; trained_beside: LoRA's and the encoder's.
    frozen_beside: bytes of what is frozen beside the LLM: the table of places, the encoder below its LoRA.
    lora_rank: 0 if all of the LLM is trained.
    bf16: autocast, or DeepSpeed's cast of all weights, with a master copy in fp32.
    zero_stage: 0 without DeepSpeed, when everything stands on every GPU.
    pointer_heads: 0 without a pointer. pointed: prompts of a batch, places that each asks for, check-ins of each.
    """
    length: int
    batch: int
    answer: int
    trained_own: int
    trained_beside: int
    frozen_beside: int = 0
    lora_rank: int = 0
    lora_dropout: bool = False
    embeddings_trained: bool = True
    norms_trained: bool = True
    four_bit: bool = False
    bf16: bool = False
    full_attention: bool = False
    checkpointing: bool = True
    zero_stage: int = 0
    gpus: int = 1
    pointer_heads: int = 0
    pointed: tuple[int, int, int] = (0, 0, 0)

    @property
    def trained(self) -> int:
        return self.trained_own + self.trained_beside

    @property
    def compute(self) -> int:
        """Bytes of a number in matrix products."""
        return BF16 if self.bf16 else FP32

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are cast for every product, which is how bf16 goes without DeepSpeed."""
        return self.bf16 and not self.zero_stage

    @property
    def stream(self) -> int:
        """Bytes of a number of the residual stream: what the embedding gives, fp32 if it is trained under autocast."""
        return FP32 if self.autocast and self.embeddings_trained else self.compute


def memory(model: Model, run: Run) -> dict[str, float]:
    """Bytes on each GPU by part, at the height of the backward pass; both ways to hold activations are given.

    The keys are those of the plan's rows; `total` adds up the chosen way.
    """
    stage, n = run.zero_stage, run.gpus
    frozen = model.parameters - run.trained_own
    # The output layer is not quantized; all that is quantized is frozen.
    quantized = model.linear if run.four_bit else 0
    frozen_bytes = quantized * NF4_BYTES + (frozen - quantized) * run.compute + run.frozen_beside
    trained_bytes = gradient = run.compute if stage else FP32       # under autocast the weights themselves are fp32
    optimizer = ADAM + (FP32 if stage else 0)                       # and the fp32 master copy of DeepSpeed
    parts = {
        "weights, frozen": frozen_bytes / (n if stage == 3 else 1),
        "weights, trained": run.trained * trained_bytes / (n if stage == 3 else 1),
        "gradients": run.trained * gradient / (n if stage >= 2 else 1),
        "optimizer": run.trained * optimizer / (n if stage >= 1 else 1),
        "communication": _communication(model, run),
        "activations, checkpointed": activations(model, run, True),
        "activations, all kept": activations(model, run, False),
        "logits": run.batch * run.answer * model.vocab * _logit_bytes(run),
    }
    if run.pointer_heads:
        parts["pointer"] = pointer(run)
    other = "activations, all kept" if run.checkpointing else "activations, checkpointed"
    parts["total"] = sum(parts.values()) - parts[other]
    return parts


def _communication(model: Model, run: Run) -> float:
    """Buffers in which gradients travel, and under ZeRO-3 parameters.

    ZeRO-1 and 2 keep two buffers of reduce_bucket_size for each type (contiguous_gradients, overlap_comm), whatever is
    trained; ZeRO-3 one, and at most stage3_max_live_parameters gathered at once. DDP keeps all gradients once more.
    """
    if run.zero_stage == 0:
        return run.trained * FP32 if run.gpus > 1 else 0
    if run.zero_stage == 3:
        return (BUCKET + min(LIVE_PARAMETERS, model.parameters + run.trained_beside)) * run.compute
    return 2 * BUCKET * run.compute


def _logit_bytes(run: Run) -> int:
    """Logits, their fp32 copy unless they are fp32, its log-softmax, and the gradient of that."""
    return run.compute + (FP32 if run.bf16 else 0) + 2 * FP32


def pointer(run: Run) -> float:
    """Bytes of what the pointer computes, at its height; they grow with the square of the check-ins."""
    prompts, asked, check_ins = run.pointed
    of_two, of_asked, of_head = POINTER[run.compute]
    return prompts * check_ins * max(check_ins * of_two, asked * (of_asked + of_head * run.pointer_heads))


def activations(model: Model, run: Run, checkpointing: bool) -> float:
    """Bytes that are alive for the backward pass when it begins in the last layer, and what this layer's takes."""
    tokens = run.length * run.batch
    layer = tokens * layer_activations(model, run) + cast_weights(model, run)
    last_norm = tokens * model.hidden * (FP32 + run.stream * run.norms_trained)
    # Two gradients of the feed-forward layer's width and that of the stream, at the height of a layer's backward.
    gradients = tokens * (2 * model.intermediate * run.compute + model.hidden * run.stream)
    if checkpointing:
        return model.layers * tokens * model.hidden * run.stream + layer + last_norm + gradients
    return model.layers * layer + last_norm + gradients


def layer_activations(model: Model, run: Run) -> int:
    """Bytes a token that one layer saves for its backward pass (fused attention, so no scores are saved)."""
    c, s = run.compute, run.stream
    h, q, k, i = model.hidden, model.query, model.key, model.intermediate
    # Each RMSNorm: its input in fp32, 1 / its root mean square, and what its weight multiplies if that is trained.
    norms = 2 * (h * (FP32 + s * run.norms_trained) + FP32)
    # Attention: queries, keys, values, output, and the scores' log-sum-exp. S²-Attn gives each query a key of its own.
    attention = c * (2 * q + 2 * (k if run.full_attention else q)) + FP32 * model.heads
    # silu(gate) · up: gate, silu(gate), up.
    feed_forward = 3 * c * i
    # What goes into a linear map is saved if that map is trained, once for all maps that read it (llm.round_norms, and
    # LoRA takes it as it is). S²-Attn's output is put together from two halves, a copy.
    if run.lora_rank and run.lora_dropout:      # the dropped-out input, and the mask, a byte each
        inputs = (c + 1) * (3 * h + q)
    else:
        inputs = c * h + (0 if run.full_attention else c * q)
    inputs += c * 4 * run.lora_rank if run.lora_rank else c * h + c * i
    return norms + attention + feed_forward + inputs


def cast_weights(model: Model, run: Run) -> int:
    """Bytes of one layer's trained weights once more, which autocast keeps in bf16 until the backward pass."""
    if not run.autocast:
        return 0
    return run.compute * (lora_parameters(model, run.lora_rank) if run.lora_rank else model.layer_linear)


def lora_parameters(model: Model, rank: int) -> int:
    """LoRA's parameters in one layer: on q, k, v and o."""
    return rank * (2 * (model.hidden + model.query) + 2 * (model.hidden + model.key))


@functools.lru_cache(maxsize=None)
def attended_pairs(length: int, heads: int, full: bool) -> int:
    """Pairs of a query and a key that it attends to, summed over the heads of one layer, causality counted."""
    if full:
        return heads * _triangle(length)
    group = group_size(length)
    pairs = 0
    for some, shift in ((heads // 2, 0), (heads - heads // 2, group // 2)):
        bounds = group_bounds(length, group, shift)
        pairs += some * sum(_triangle(end - start) for start, end in zip(bounds, bounds[1:]))
    return pairs


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def flops(model: Model, run: Run, tokens, pairs, answer) -> dict:
    """Floating-point operations of a training step by pass: `forward`, `backward`, and with checkpointing `again`.

    tokens, pairs (attended_pairs) and answer (positions with logits) of the step; arrays give arrays.
    """
    lora = model.layers * lora_parameters(model, run.lora_rank)
    linear = 2 * tokens * model.linear
    adapters = 2 * tokens * lora
    head = 2 * answer * model.embedding
    attention = 4 * pairs * model.head_dim * model.layers       # scores, and values by scores
    # The gradient of a map's input costs what the map costs; that of its weights the same again, if they are trained.
    head_trained = run.lora_rank == 0 or (model.tied and run.embeddings_trained)
    backward = (linear * (1 if run.lora_rank else 2) + adapters * 2 + head * (2 if head_trained else 1)
                + attention * ATTENTION_BACKWARD)
    # A layer's second forward pass stops once all is there that was saved: before the last map, `down`.
    down = 2 * tokens * model.layers * model.hidden * model.intermediate
    again = linear + adapters + attention - down if run.checkpointing else 0 * linear
    return {"forward": linear + adapters + head + attention, "backward": backward, "again": again}


def padded(lengths: np.ndarray, batch: int) -> np.ndarray:
    """(batches,) the longest of each `batch` sequences in a row, to which the others of a batch are padded."""
    whole = np.concatenate([lengths, np.zeros(-len(lengths) % batch, dtype=lengths.dtype)])
    return whole.reshape(-1, batch).max(axis=1)


def tree_pairs(shared: tuple[int, ...], lengths: tuple[int, ...], heads: int) -> int:
    """attended_pairs of a tree: its pairs begin with `shared` tokens of a trunk each, the last one with all of it."""
    own = [(length - common) * common + _triangle(length - common) for length, common in zip(lengths, shared)]
    return heads * (_triangle(shared[-1]) + sum(own))


def checkpoint_bytes(run: Run) -> int:
    """On disk: what is trained, in fp32, and the optimizer's moments; of DeepSpeed, both it and its own copies."""
    return run.trained * (FP32 + ADAM + (FP32 + run.compute if run.zero_stage else 0))


def seconds(work: np.ndarray, measured: list[tuple[float, float]]) -> np.ndarray:
    """Time of steps of given FLOPs, on the line through two measured steps (FLOPs, seconds), neither part below zero.

    The line's height at zero is what every step costs whatever its length.
    """
    (one, first), (two, second) = sorted(measured)
    slope = (second - first) / (two - one) if two > one else second / two
    slope = min(max(slope, 0.0), second / two)
    return second + slope * (work - two)
