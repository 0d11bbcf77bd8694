"""What the project does with tiny random models of each family (families.py)."""
import copy
import json

import forked
import pytest
import torch
import torch.nn.functional as F
from commands import MAPPING, evaluation, losses
from families import FAMILIES, write
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from ga_llm.base import artifacts, prompts
from ga_llm.base.cli import UserError
from ga_llm.evaluation import ranking
from ga_llm.llm import backbone, plan, shifted_attention
from ga_llm.llm.shifted_attention import SHIFTED_SPARSE
from ga_llm.llm.tree_attention import TREE
from ga_llm.pairs import sft_data, spelling, token_cache
from geo_encoder import gps_tokens, injection

IDS = [0, 1, 3, 10, 12, 35, 123, 354, 999, 1234, 3544]      # one begins another, in characters or also in tokens
FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A family's folder, made once: folder("qwen3")."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("backbones") / family
            write(FAMILIES[family], made[family])
        return str(made[family])
    return make


@pytest.fixture
def mapping(tmp_path):
    path = tmp_path / "mapping.csv"
    path.write_text("GPS_id,Latitude,Longitude\n" + "".join(f"{i},{40 + i / 9999},{-74 + i / 9999}\n" for i in IDS))
    return gps_tokens.read_gps_mapping(path)


def pair(history, target):
    places = [prompts.check_in(("clock", "user", "poi", "gps"), "2012-04-03 18:00:09", 7, poi, 40.5, -74.5, "", 0)
              for poi in history]
    return prompts.join(prompts.question(7, [], places[:-2], places[-2:], prompts.ask_poi(
        "2012-04-04 09:00:00", 7, 0, max(IDS))), prompts.answer_poi("2012-04-04 09:00:00", 7, target))


PAIRS = [pair([0, 12, 354, 3], 3544), pair([0, 12, 354, 1234], 354), pair([35], 12), pair([999] * 3, 3)]


def ready(folder, mapping, attention, length=512, dtype=torch.float32, **options):
    """Tokenizer and model with the places' tokens and the vectors of an untrained encoder."""
    tokenizer = backbone.load_tokenizer(folder)
    model = backbone.load_llm(folder, length, attention, dtype, **options)
    token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, model)
    torch.manual_seed(0)
    injection.attach_untrained(model, mapping, token_ids)
    return tokenizer, model, token_ids


# Spelling and ranking.

@FAMILY
def test_digits(folder, family):
    """Which tokenizers split and merge digits, and which ids need their end to be told from others."""
    tokenizer = backbone.load_tokenizer(folder(family))
    expected = {1: {35: "3 5 .", 354: "3 5 4 .", 3544: "3 5 4 4", 12: "1 2 .", 999: "9 9 9", 0: "0"},
                3: {35: "35", 354: "354 .", 3544: "354 4", 12: "12", 999: "999", 0: "0"}}[FAMILIES[family].digits]
    spelled = spelling.Spelling(tokenizer, IDS, ".")
    assert {poi: " ".join(tokenizer.convert_ids_to_tokens(spelled.tokens[poi])) for poi in expected} == expected
    assert (tokenizer("POI id 3")["input_ids"][0] == tokenizer.bos_token_id) == FAMILIES[family].bos
    tokens = list(spelled.tokens.values())
    assert not any(a == b[:len(a)] for a in tokens for b in tokens if a is not b)


@FAMILY
@torch.inference_mode()
def test_ranking_equals_each_answer_alone(folder, mapping, family):
    tokenizer, model, _ = ready(folder(family), mapping, TREE)
    spelled = spelling.Spelling(tokenizer, IDS, ".")
    trie, test_prompts = ranking.Trie(spelled.tokens), spelled.prompts(PAIRS, 512)
    found = {prompt.pair: result for group in ranking.plan(test_prompts, 8) for chunk, results in ranking.rank(
        model.eval(), trie, group, full=True) for prompt, result in zip(chunk, results)}
    for prompt, text in zip(test_prompts, PAIRS):
        ranking.check(model, trie, prompt)
        start = spelling.answer_id(text)[0]
        for poi, value in zip(trie.candidates, found[prompt.pair].log_probs.tolist()):
            whole = tokenizer(text[:start] + f"{poi}.")["input_ids"]      # the text as a stranger would tokenize it
            assert whole[:len(prompt.input_ids)] == prompt.input_ids
            answer = whole[len(prompt.input_ids):][:len(spelled.tokens[poi])]
            assert answer == spelled.tokens[poi]
            log_probs = model(torch.tensor([prompt.input_ids + answer])).logits[0].log_softmax(-1)
            alone = sum(log_probs[len(prompt.input_ids) + i - 1, token].item() for i, token in enumerate(answer))
            assert value == pytest.approx(alone, abs=1e-4)
    assert max(found[0].log_probs) - min(found[0].log_probs) > 1        # else anything would be equal


@FAMILY
def test_cached_tokens_are_those_of_the_whole_text(folder, mapping, tmp_path, monkeypatch, family):
    monkeypatch.setattr(token_cache, "CHECKED_EVERY", 10**9)
    tokenizer = backbone.load_tokenizer(folder(family))
    gps_tokens.add_gps_tokens(tokenizer, mapping)
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([dict(zip(("question", "answer"), prompts.split(text))) for text in PAIRS]))
    for length in (512, 60):
        data = token_cache.load(path, tokenizer, length, "m.csv")
        for item, text in zip(data, sft_data.iterate_pairs(path), strict=True):
            ids, start = sft_data.encode(tokenizer, text)
            cut = sft_data.truncate(ids, length, tokenizer.bos_token_id)
            assert item["input_ids"].tolist() == cut and item["answer_start"] == start - (len(ids) - len(cut))
            assert cut[-1] == tokenizer.eos_token_id
            assert (cut[0] == tokenizer.bos_token_id) == FAMILIES[family].bos


# Training.

def names_of_norms(family):
    own = ["self_attn.q_norm", "self_attn.k_norm"] if family == "qwen3" else []
    return {f"layers.{layer}.{name}" for layer in (0, 1) for name in (
        "input_layernorm", "post_attention_layernorm", *own)} | {"norm"}


@FAMILY
def test_a_training_step(folder, mapping, family):
    """LoRA on q, k, v, o, embeddings and norms get gradients, the rows of <GPS n> none, nor does anything else."""
    tokenizer, model, token_ids = ready(folder(family), mapping, SHIFTED_SPARSE)
    tied = model.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    mean = model.get_input_embeddings().weight[:token_ids.min()].mean(0)
    torch.testing.assert_close(model.get_input_embeddings().weight[token_ids[3]], mean)
    model = backbone.add_lora(model, 4, 8, 0.0)
    backbone.train_by_name(model, "embed,norm")
    backbone.trainable_to_fp32(model)
    batch = sft_data.AnswerCollator(tokenizer.pad_token_id)([
        dict(zip(("input_ids", "answer_start"), sft_data.encode(tokenizer, text))) for text in PAIRS])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:        # at zero it would keep all gradient from lora_A
            torch.nn.init.normal_(parameter, std=0.02)
    model.train()(**batch).loss.backward()

    gradients = {name.removeprefix("base_model.model."): parameter.grad for name, parameter in model.named_parameters()
                 if parameter.requires_grad}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients.values())
    lora = {name.split("model.")[1].split(".lora_")[0] for name in gradients if "lora_" in name}
    assert lora == {f"layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkvo"}
    beside = {name.removeprefix("model.").removesuffix(".weight") for name in gradients if "lora_" not in name}
    assert beside == {"embed_tokens"} | names_of_norms(family)
    rows = gradients["model.embed_tokens.weight"].abs().sum(1)
    last = sft_data.encode(tokenizer, PAIRS[0])[0][-3]      # a sliding window hides the first ones
    assert rows[token_ids].sum() == 0 and rows[last] > 0
    if not tied:        # else every row is an output, too
        assert (rows > 0).sum() <= batch["input_ids"].unique().numel()


@FAMILY
def test_four_bits(folder, mapping, family):
    pytest.importorskip("bitsandbytes")
    tokenizer, model, token_ids = ready(folder(family), mapping, SHIFTED_SPARSE, dtype=torch.bfloat16, four_bit=True)
    kinds = {name.rsplit(".")[-1]: type(module).__name__ for name, module in model.named_modules()}
    assert {kinds[f"{part}_proj"] for part in "qkvo"} == {"Linear4bit"} and kinds["lm_head"] == "Linear"
    model = backbone.add_lora(model, 4, 8, 0.0)
    ids = torch.tensor([tokenizer(PAIRS[0])["input_ids"]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 8 and all(grad.abs().sum() > 0 for grad in gradients)


# Context.

@pytest.mark.parametrize("family, rope", [
    ("llama-2", ("linear", 4)), ("llama-3", ("linear", 4)), ("qwen2.5", ("linear", 4)), ("qwen3", ("linear", 4)),
    ("mistral-0.1", ("linear", 4)), ("smollm2", ("linear", 4)), ("llama-3.2", None)])
def test_longer_context(folder, family, rope):
    """Positions are divided where they are not scaled yet; what the model has learned otherwise is left, or refused."""
    config = backbone.AutoConfig.from_pretrained(folder(family))
    before = copy.deepcopy(config.rope_parameters)
    backbone.extend_context(config, 512)
    assert config.rope_parameters == before
    if rope is None:
        with pytest.raises(UserError, match=r"its context is 512 tokens, and its positions \(llama3\) cannot.*512 for"):
            backbone.load_llm(folder(family), 513, "sdpa", torch.float32)
        return
    model = backbone.load_llm(folder(family), 2048, "sdpa", torch.float32)
    assert (model.config.rope_parameters["rope_type"], model.config.rope_parameters["factor"]) == rope
    plain = backbone.load_llm(folder(family), 512, "sdpa", torch.float32)
    x = torch.zeros(1, 1, 8)
    for scaled, own in zip(model.model.rotary_emb(x, torch.tensor([[28]])), plain.model.rotary_emb(
            x, torch.tensor([[7]]))):
        torch.testing.assert_close(scaled, own)


@pytest.mark.parametrize("rope, reaches", [
    # As Qwen's cards tell to write it: max_position_embeddings stays what it was.
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
    ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0,
      "original_max_position_embeddings": 512}, 512),
    ({"rope_type": "dynamic", "factor": 2.0}, 512)])
def test_positions_that_are_scaled_already(rope, reaches):
    config = Qwen2Config(max_position_embeddings=512, rope_parameters={**rope, "rope_theta": 1e4})
    before = copy.deepcopy(config.rope_parameters)
    backbone.extend_context(config, reaches)
    assert config.rope_parameters == before
    with pytest.raises(UserError, match=f"context is {reaches} .*{rope['rope_type']}") as caught:
        backbone.extend_context(config, reaches + 1)
    assert "\n" not in str(caught.value) and f"at most {reaches} for --model_max_length" in str(caught.value)


def test_positions_that_differ_by_layer_are_refused():
    config = LlamaConfig(max_position_embeddings=512)
    config.rope_parameters = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear"}}
    with pytest.raises(UserError, match="another way in each kind of layer"):
        backbone.extend_context(config, 1024)


# The sliding window.

@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("window", [1, 3, 8, 20])
def test_groups_keep_the_window(monkeypatch, side, window):
    """S²-Attn with a window shorter or longer than its groups of 8, against a dense mask, in training and in eval."""
    monkeypatch.setattr(shifted_attention, "group_size", lambda length: 8)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 21, 8, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.ones(2, 21, dtype=torch.bool)
    if side != "none":
        mask[1, :6 if side == "left" else None] = side != "left"
        mask[1, 15:] &= side != "right"
    for training in (True, False):
        module = torch.nn.Identity().train(training)
        out, _ = shifted_attention.shifted_sparse_attention(module, q, k, v, None if side == "none" else mask,
                                                            sliding_window=window)
        seen = shifted_attention.dense_mask(21, 8 if training else 64, 4, window)[None] & mask[:, None, None, :]
        dense = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=seen)
        real = mask[:, None, :, None].expand_as(dense)
        got, wanted = out.transpose(1, 2)[real], dense[real]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (got, wanted))):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_the_window_by_hand():
    mask = shifted_attention.dense_mask(6, 4, heads=2, window=2).int().tolist()
    assert mask[0] == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0],
                       [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]


def test_mistrals_window_is_that_of_transformers(folder, caplog):
    """In training, where one group holds the whole text, and in eval; without the window the loss is another."""
    ids = torch.randint(3, 250, (2, 70))
    loss = {}
    for attention in (SHIFTED_SPARSE, "sdpa"):
        with caplog.at_level("INFO"):
            model = backbone.load_llm(folder("mistral-0.1"), 512, attention, torch.float32)
        for training in (True, False):
            loss[attention, training] = model.train(training)(input_ids=ids, labels=ids).loss.item()
    assert "a token sees no more than the 24 last ones" in caplog.text
    for training in (True, False):
        assert loss[SHIFTED_SPARSE, training] == pytest.approx(loss["sdpa", training], rel=1e-5)
    model.config.sliding_window = None
    assert abs(model(input_ids=ids, labels=ids).loss.item() - loss["sdpa", False]) > 1e-2


# The plan.

@FAMILY
def test_parameters_are_counted(folder, family):
    config = backbone.AutoConfig.from_pretrained(folder(family))
    assert plan.Model.of(config).parameters == AutoModelForCausalLM.from_config(config).num_parameters()


@pytest.mark.parametrize("config, options", [(LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
                                             (Qwen3Config, {"attention_bias": True, "head_dim": 24})])
def test_biases_are_counted(config, options):
    config = config(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=100, **options)
    assert plan.Model.of(config).parameters == AutoModelForCausalLM.from_config(config).num_parameters()


PUBLISHED = {       # hidden, layers, heads, kv heads, intermediate, vocabulary, head width
    "Llama-2-7B": (LlamaConfig, (4096, 32, 32, 32, 11008, 32000, 128), False, 6_738_415_616),
    "Llama-3.1-8B": (LlamaConfig, (4096, 32, 32, 8, 14336, 128256, 128), False, 8_030_261_248),
    "Llama-3.2-1B": (LlamaConfig, (2048, 16, 32, 8, 8192, 128256, 64), True, 1_235_814_400),
    "Mistral-7B-v0.1": (MistralConfig, (4096, 32, 32, 8, 14336, 32000, 128), False, 7_241_732_096),
    "Qwen2.5-3B": (Qwen2Config, (2048, 36, 16, 2, 11008, 151936, None), True, 3_085_938_688),
    "Qwen3-4B": (Qwen3Config, (2560, 36, 32, 8, 9728, 151936, 128), True, 4_022_468_096),
    "SmolLM2-135M": (LlamaConfig, (576, 30, 9, 3, 1536, 49152, 64), True, 134_515_008),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    kind, shape, tied, parameters = PUBLISHED[name]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
             "vocab_size", "head_dim")
    config = kind(**{key: value for key, value in zip(names, shape) if value}, tie_word_embeddings=tied)
    assert plan.Model.of(config).parameters == parameters


# The scripts.

@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "mistral-0.1"])
def test_scripts(repo, folder, tmp_path, family):
    """Stage 1, stage 2 and the evaluation take a family as they take any other."""
    gcim, trained_ = tmp_path / "gcim", tmp_path / "llm"
    flags = ["--model_name_or_path", folder(family), "--max_steps", 2, "--save_steps", 2]
    forked.train(repo, 1, gcim, *flags)
    encoder = ["--geoencoder_path", str(gcim / "2" / artifacts.MERGED_ENCODER)]
    forked.train(repo, 2, trained_, *flags, *encoder)
    assert all(loss > 0 for loss in losses(trained_ / "checkpoint-2"))
    command = evaluation(str(trained_ / "checkpoint-2"), "--base_model", folder(family), *encoder, "--limit", "6")
    result = forked.run(repo, command, tmp_path / "evaluation")
    assert result.code == 0, result.err
    places = (repo / MAPPING).read_text().count("\n") - 1
    lines = [json.loads(line) for path in trained_.rglob("predictions.jsonl") for line in path.open()]
    assert len(lines) == 6 and all(1 <= line["rank"] <= places for line in lines if line["rank"])
