"""The plan against hand calculation, published figures, real tensors and torch's own counter of FLOPs."""
import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM

from ga_llm.llm import backbone, plan
from ga_llm.llm.pointer import Pointer, PointerConfig
from ga_llm.llm.shifted_attention import SHIFTED_SPARSE, dense_mask, group_size
from geo_encoder.gps_tokens import GPSMapping

ANSWER = 4      # positions with logits in what follows
LLAMA_2_7B = plan.Model(hidden=4096, layers=32, heads=32, kv_heads=32, intermediate=11008, vocab=32000 + 4980,
                        head_dim=128)
STAGE_2 = plan.Run(length=32768, batch=1, answer=40, trained_own=151_470_080 + 266_240, trained_beside=8_388_608,
                   frozen_beside=4980 * 4096 * 2, lora_rank=8, lora_dropout=True, four_bit=True, bf16=True,
                   zero_stage=2)


def test_memory_of_llama_2_7b_by_hand():
    """The README's stage 2 on NYC, whose 4,980 places make a vocabulary of 36,980; one GPU, then eight."""
    parts, shared = plan.memory(LLAMA_2_7B, STAGE_2), plan.memory(LLAMA_2_7B, plan.dataclasses.replace(STAGE_2, gpus=8))
    # A layer's maps: q, k, v, o are 4 · 4096² = 67,108,864, gate, up, down 3 · 4096 · 11008 = 135,266,304;
    # 32 layers of 202,375,168 are 6,476,005,376. In NF4: half a byte each is 3,238,002,688, a byte for every 64 is
    # 101,187,584, four bytes for every 16,384 are 1,581,056: together 3,340,771,328.
    # The output layer stays in bf16: 36,980 · 4096 · 2 = 302,940,160. The places' table: 4980 · 4096 · 2 = 40,796,160.
    assert parts["weights, frozen"] == 3_340_771_328 + 302_940_160 + 40_796_160 == shared["weights, frozen"]
    # Trained: embeddings 36,980 · 4096 = 151,470,080; norms 65 · 4096 = 266,240; LoRA 32 · 4 · 8 · 8192 = 8,388,608.
    # Together 160,124,928: two bytes in bf16, two for the gradient; in fp32 a master copy and two moments, 12.
    assert parts["weights, trained"] == 320_249_856 == shared["weights, trained"]
    assert parts["gradients"] == 320_249_856 and shared["gradients"] == 40_031_232
    assert parts["optimizer"] == 1_921_499_136 and shared["optimizer"] == 240_187_392
    # Two buffers of 500 million bf16 numbers.
    assert parts["communication"] == 2_000_000_000 == shared["communication"]
    # A token, in one layer: two norms of 16,384 (input, fp32) + 8,192 (normed, bf16) + 4: 49,160. q, k, v and output
    # 4 · 8,192 = 32,768. 32 heads' log-sum-exp 128. Four LoRA inputs of 8,192 and masks of 4,096: 49,152; LoRA's ranks
    # 4 · 8 · 2 = 64. gate, silu(gate), up 3 · 22,016 = 66,048. Together 197,320, times 32,768 tokens 6,465,781,760.
    # The last norm: 24,576 · 32,768 = 805,306,368. Gradients at the height of it: (2 · 22,016 + 8,192) · 32,768 =
    # 1,711,276,032. Checkpointed, each layer keeps its input: 32 · 32,768 · 8,192 = 8,589,934,592.
    assert parts["activations, checkpointed"] == 8_589_934_592 + 6_465_781_760 + 805_306_368 + 1_711_276_032
    assert parts["activations, all kept"] == 206_905_016_320 + 805_306_368 + 1_711_276_032
    # Logits in bf16, in fp32, their log-softmax and its gradient: 40 · 36,980 · 14.
    assert parts["logits"] == 20_708_800
    assert parts["total"] == 25_839_514_048             # 24.1 GiB
    assert shared["total"] == 25_839_514_048 - 280_218_624 - 1_681_311_744


def test_flops_of_llama_2_7b_by_hand():
    # Groups of 8,192, 33,558,528 pairs each. Four of them for half the heads: 134,234,112. For the other half three and
    # two of 4,096, 8,390,656 each: 117,456,896. Full attention has 536,887,296.
    pairs = plan.attended_pairs(32768, 32, full=False)
    assert pairs == 16 * 134_234_112 + 16 * 117_456_896
    assert plan.attended_pairs(32768, 32, full=True) == 32 * 536_887_296
    step = plan.flops(LLAMA_2_7B, STAGE_2, 32768, pairs, 40)
    linear = 2 * 32768 * 6_476_005_376                  # 4.244e14
    lora = 2 * 32768 * 8_388_608
    head = 2 * 40 * 151_470_080
    attention = 4 * pairs * 128 * 32                    # 6.60e13; in full 2.81e14
    assert step["forward"] == linear + lora + head + attention
    assert step["backward"] == linear + 2 * lora + head + 2.5 * attention
    assert step["again"] == linear + lora + attention - 2 * 32768 * 32 * 4096 * 11008
    assert sum(step.values()) == pytest.approx(1.478e15, rel=1e-3)


@pytest.mark.parametrize("stage, gigabytes", [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_as_published(stage, gigabytes):
    """ZeRO's Figure 1: weights, gradients and Adam of 7.5 billion parameters, all trained, on 64 GPUs."""
    model = plan.Model(hidden=1, layers=0, heads=1, kv_heads=1, intermediate=0, vocab=3_750_000_000, head_dim=1)
    run = plan.Run(1, 1, 0, trained_own=model.parameters, trained_beside=0, bf16=stage > 0, zero_stage=stage, gpus=64)
    parts = plan.memory(model, run)
    states = sum(parts[name] for name in ("weights, frozen", "weights, trained", "gradients", "optimizer"))
    assert states / 1e9 == pytest.approx(gigabytes, abs=0.05)


def tiny(layers=2, attention="sdpa", **options):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 500, **options}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, max_position_embeddings=8192,
                                        attn_implementation=attention, use_cache=False, **shape))


# rank, trained by name, type of the frozen weights, DeepSpeed's way with bf16 (all in bf16, no autocast)
WAYS = {
    "full, fp32": (0, "", torch.float32, False),
    "full, autocast": (0, "", torch.bfloat16, False),
    "stage 2, fp32": (8, "embed,norm", torch.float32, False),
    "stage 2, autocast": (8, "embed,norm", torch.bfloat16, False),
    "stage 2, DeepSpeed": (8, "embed,norm", torch.bfloat16, True),
    "norms, autocast": (8, "norm", torch.bfloat16, False),
    "stage 1, autocast": (8, "", torch.bfloat16, False),
    "stage 1, DeepSpeed": (8, "", torch.bfloat16, True),
}


def trained(way, layers, attention, dropout=0.0, **shape):
    """A tiny model that is trained in one of WAYS, and its Run of 128 tokens."""
    rank, names, dtype, deepspeed = WAYS[way]
    model = tiny(layers, attention, **shape).to(dtype if rank else torch.float32)
    base = model
    backbone.round_norms(model)
    if rank:
        model = backbone.add_lora(model, rank, 16, dropout)
        backbone.train_by_name(model, names)
        backbone.trainable_to_fp32(model)
    backbone.prepare_for_autocast(model)
    if deepspeed:
        model.to(torch.bfloat16)
    own = beside = 0
    for name, parameter in model.named_parameters():
        count = parameter.numel() * parameter.requires_grad
        own, beside = own + count * ("lora_" not in name), beside + count * ("lora_" in name)
    return model.train(), plan.Model.of(base.config), plan.Run(
        length=128, batch=1, answer=ANSWER, trained_own=own, trained_beside=beside, lora_rank=rank,
        lora_dropout=dropout > 0, embeddings_trained=not rank or "embed" in names,
        norms_trained=not rank or "norm" in names, bf16=dtype == torch.bfloat16, full_attention=attention == "sdpa",
        checkpointing=False, zero_stage=2 if deepspeed else 0)


def loss(model, run):
    labels = torch.ones(1, ANSWER, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.autocast):
        return model(input_ids=torch.randint(0, 400, (1, run.length)), labels=labels, shift_labels=labels,
                     logits_to_keep=ANSWER).loss


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["sdpa", SHIFTED_SPARSE])
@pytest.mark.parametrize("way", WAYS)
def test_saved_tensors_of_a_layer(way, attention, dropout):
    """What two layers more save for the backward pass, byte for byte."""
    saved = []
    for layers in (2, 4):
        model, shape, run = trained(way, layers, attention, dropout)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage      # held, so that no other takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(model, run)
        saved.append(sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own))
    expected = run.length * plan.layer_activations(shape, run) + plan.cast_weights(shape, run)
    if run.lora_dropout and run.lora_rank:      # on a CPU a dropout mask has the type of what is dropped, not a byte
        mask = 2 if run.bf16 else 4
        expected += run.length * (3 * shape.hidden + shape.query) * (mask - 1)
    assert (saved[1] - saved[0]) / 2 == expected


def height_of(profiler) -> int:
    """The most bytes that were allocated at once."""
    events = sorted((event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"),
                    key=lambda event: event.start_ns())
    return np.cumsum([event.nbytes() for event in events]).max()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["stage 2, fp32", "stage 2, DeepSpeed"])
def test_height_of_a_step(way, checkpointing):
    """All that a forward and backward pass allocates, at its height."""
    model, shape, run = trained(way, 4, SHIFTED_SPARSE, hidden_size=128, intermediate_size=344, num_key_value_heads=4)
    run = plan.dataclasses.replace(run, length=1024, checkpointing=checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss(model, run).backward()     # what is allocated once and for all
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss(model, run).backward()
    height = height_of(profiler)
    parts = plan.memory(shape, run)
    name = "activations, checkpointed" if checkpointing else "activations, all kept"
    assert parts[name] + parts["gradients"] + parts["logits"] == pytest.approx(height, rel=0.1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("asked, check_ins, heads", [(120, 120, 8), (200, 200, 1), (40, 200, 4), (1, 400, 8)])
def test_height_of_the_pointer(asked, check_ins, heads, autocast):
    """All that its forward and backward pass allocates, at its height: within a sixth of what is expected."""
    ids, generator = np.arange(1, 51), torch.Generator().manual_seed(0)
    mapping = GPSMapping(ids, 40 + ids / 100, -74 + ids / 50)
    module = Pointer(PointerConfig(hidden_size=16, heads=heads), mapping, dropout=0.1)
    place = torch.randint(0, 50, (2, check_ins), generator=generator)
    second = torch.randint(0, 10**7, (2, check_ins), generator=generator).sort(1).values
    first = (torch.arange(check_ins) // 4 * 4).repeat(2, 1)
    query = torch.arange(check_ins)[-asked:].repeat(2, 1)

    def height():
        asking, states = (torch.randn(2, n, 16, requires_grad=True) for n in (asked, check_ins))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = module(asking, states, second, place, first, query)
            found.of_targets(place, place.gather(1, query)).sum().backward()
        return height_of(profiler)

    height()        # what is allocated once and for all
    run = plan.Run(1, 1, 1, 0, 0, bf16=autocast, pointer_heads=heads, pointed=(2, asked, check_ins))
    assert plan.pointer(run) == pytest.approx(height(), rel=1 / 6)
    parts, without = (plan.memory(LLAMA_2_7B, one) for one in (run, plan.dataclasses.replace(run, pointer_heads=0)))
    assert parts["total"] - without["total"] == pytest.approx(parts["pointer"]) and "pointer" not in without


@pytest.mark.parametrize("way", ["full, fp32", "stage 2, fp32", "stage 2, autocast"])
def test_states_of_a_real_model(way):
    model, shape, run = trained(way, 2, "sdpa")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    loss(model, run).backward()
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    parts = plan.memory(shape, run)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for name, tensors in (("weights, frozen", frozen), ("weights, trained", parameters), ("optimizer", moments),
                          ("gradients", [parameter.grad for parameter in parameters])):
        assert parts[name] == sum(tensor.nbytes for tensor in tensors), name
    assert shape.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)


def test_bytes_of_nf4():
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(512, 256), quant_type="nf4", compress_statistics=True)
    assert packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes == 512 * 256 * plan.NF4_BYTES


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", SHIFTED_SPARSE])
@pytest.mark.parametrize("way", ["full, fp32", "stage 2, fp32"])
def test_flops_as_torch_counts_them(way, attention, checkpointing):
    """torch's counter takes attention for dense: the pairs of a group are its length squared."""
    model, shape, run = trained(way, 2, attention, num_key_value_heads=4)
    run = plan.dataclasses.replace(run, length=4096, checkpointing=checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    aten = torch.ops.aten
    # The counter knows attention on a GPU alone.
    on_cpu = {aten._scaled_dot_product_flash_attention_for_cpu:
                  lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
              aten._scaled_dot_product_flash_attention_for_cpu_backward:
                  lambda grad, q, k, v, *args, **kwargs: sdpa_backward_flop_count(grad, q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        loss(model, run).backward()
    dense = 4 * 4096 ** 2
    if attention == SHIFTED_SPARSE:     # groups of 1,024, for half the heads with one of 512 at either end
        dense = 2 * 4 * 1024 ** 2 + 2 * (3 * 1024 ** 2 + 2 * 512 ** 2)
    # Older transformers multiplies positions by frequencies as matrices.
    rotary = sum(sum(of.values()) for name, of in counter.get_flop_counts().items() if name.endswith(".rotary_emb"))
    assert counter.get_total_flops() - rotary == sum(plan.flops(shape, run, 4096, dense, ANSWER).values())


@pytest.mark.parametrize("length, heads", [(4096, 2), (4096, 3), (700, 4), (1, 4)])
def test_attended_pairs_are_those_of_the_mask(length, heads):
    mask = dense_mask(length, group_size(length), heads)
    assert plan.attended_pairs(length, heads, full=False) == mask.sum()
    assert plan.attended_pairs(length, heads, full=True) == heads * torch.ones(length, length).tril().sum(dtype=int)


def test_attended_pairs_beyond_one_group_by_hand():
    """9,000 tokens: groups of 8,192 and 808 for one head, of 4,096 and 4,904 for the other."""
    assert plan.attended_pairs(9000, 2, full=False) == 33_558_528 + 326_836 + 8_390_656 + 12_027_060


def test_pairs_of_a_tree_by_hand():
    """The trunk a b c d e f of 21 pairs; x y behind 3: 6 + 3; z behind 5: 5 + 1; w behind 6: 6 + 1."""
    assert plan.tree_pairs((3, 5, 6), (5, 6, 7), heads=2) == 2 * (21 + 9 + 6 + 7)
    assert plan.tree_pairs((0,), (4,), heads=1) == 10


def test_padding_by_hand():
    assert plan.padded(np.array([3, 5, 2, 1, 4]), 2).tolist() == [5, 2, 4]


def test_seconds_lie_on_the_line_of_two_steps():
    assert plan.seconds(np.array([10.0, 20.0, 0.0]), [(10.0, 2.0), (20.0, 3.0)]).tolist() == [2, 3, 1]
    # Nothing costs less than nothing, and no step gets faster by more work.
    assert plan.seconds(np.array([0.0, 5.0]), [(10.0, 1.0), (20.0, 4.0)]).tolist() == [0, 1]
    assert plan.seconds(np.array([0.0, 5.0]), [(10.0, 4.0), (20.0, 3.0)]).tolist() == [3, 3]
    assert plan.seconds(np.array([5.0]), [(10.0, 2.0), (10.0, 2.0)]).tolist() == [1]


def test_checkpoints_hold_weights_and_moments():
    """160,124,928 trained parameters: 12 bytes each; under DeepSpeed 18."""
    assert plan.checkpoint_bytes(plan.dataclasses.replace(STAGE_2, zero_stage=0)) == 1_921_499_136
    assert plan.checkpoint_bytes(STAGE_2) == 2_882_248_704
