"""Every sentence of an exported model's card is taken from what training and evaluation recorded."""
import dataclasses
import json
from pathlib import Path

import pytest
from make_tiny_llama import byte_level_tokenizer, sample_prompts, words_tokenizer

from ga_llm.serving import export, model_card

FLAGS = {"loss_on": "answer", "use_full_attn": False, "label_smoothing_factor": 0.0, "init_from": None, "lora_r": 8,
         "lora_alpha": 16, "learning_rate": 2e-5, "lr_scheduler_type": "constant", "max_steps": -1,
         "num_train_epochs": 3.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "seed": 42}
MODEL = model_card.Model(
    folder=Path("E"), base="base", dataset="nyc", raw_from="somewhere", context=4096, dtype="bfloat16", full=False,
    questions={"fields": ["poi", "gps"], "use_sim": False, "max_history": 10}, trained=["model.norm.weight"],
    quantization="none", rounded=False, flags=FLAGS, step=7, processes=2, metrics=None, encoders=["GCIM"], places=3,
    first=1, last=3, latitude=40.0, longitude=-74.0)


def card(flags=FLAGS, **changes) -> str:
    """On one line."""
    return " ".join(model_card.card(dataclasses.replace(MODEL, flags=flags, **changes)).split())


def test_as_it_was_trained():
    assert "Loss on the answers alone, questions of at most 4,096 tokens." in card()
    assert ("step 7, lora_r 8, lora_alpha 16, learning_rate 2e-05, lr_scheduler_type constant, num_train_epochs 3.0, "
            "per_device_train_batch_size 1, gradient_accumulation_steps 4, seed 42, processes 2.") in card()
    assert "S²-Attn (LongLoRA), in training alone." in card()
    assert "smoothed" not in card() and "another run" not in card()


@pytest.mark.parametrize("changes, told, not_told", [
    ({"loss_on": "poi_ids"}, "Loss on every POI id, the questions' too", "answers alone"),
    ({"use_full_attn": True}, "Full attention.", "S²-Attn"),
    ({"label_smoothing_factor": 0.1}, "Labels smoothed by 0.1.", "another run"),
    ({"init_from": "/home/me/C"}, "began with the weights of another run", "/home/me"),
    ({"max_steps": 50}, "max_steps 50", "num_train_epochs"),
    ({"loss_on": None}, "On what its loss was is not known", "answers alone"),
])
def test_with_other_flags(changes, told, not_told):
    found = card(FLAGS | changes)
    assert told in found and not_told not in found


def test_what_nobody_has_told():
    found = card(None, step=None, processes=None, quantization=None, trained=[])
    assert "what its loss was on, and its other settings, are not known" in found and "answers alone" not in found
    assert "Whether the base was quantized to 4 bits in training is not known." in found and "seed" not in found
    assert "Beside it" not in found


def test_all_weights():
    found = card(full=True)
    assert "- All weights." in found and "lora_r" not in found and "none of them quantized" in found


@pytest.mark.parametrize("quantization, rounded, told", [
    ("none", False, "The base was not quantized in training, and LoRA is merged into these weights"),
    ("nf4", True, "The base was in 4 bits (NF4) in training, and LoRA is merged into these weights"),
    ("nf4", False, "is merged into its unquantized weights here: not the model that was trained."),
    ("none", True, "rounded to 4 bits (NF4) here: not the model that was trained.")])
def test_the_base(quantization, rounded, told):
    assert told in card(quantization=quantization, rounded=rounded)


def test_where_it_was_measured():
    cells = dict.fromkeys(("Acc@1", "Acc@5", "MRR"), {"value": 0.2, "low": 0.1, "high": 0.3})
    found = {"all": {"model": {"n": 40, **cells}}, "protocol": "sthgcn", "decoding": "rank"}
    told = card(metrics=found | {"settings": {"test_file": "datasets/nyc/preprocessed/validate_qa.txt"}})
    assert "On the questions of `validate_qa.txt`, n = 40 (protocol sthgcn, decoding rank)" in told
    assert "questions of which no file is told, n = 40" in card(metrics=found)


def test_which_transformers_reads_it():
    assert "also have the keys that 4.5x looks for" in card() and "needs transformers 5" not in card()
    assert "**It needs transformers 5**" in card(older=False) and "keys that 4.5x" not in card(older=False)


@pytest.mark.parametrize("questions, ends, follows, tokens", [
    ({"fields": ["poi", "gps"]}, "<answer>: At 2013-01-05 18:00:00, user 1 will visit POI id ", "`n.`", 8),
    ({"fields": ["moment", "gps"]}, ">POI id ", "`n.`", 8),
    ({"fields": ["moment", "gps"], "answer": "token"}, ">", "the token `<GPS n>`", 1)],
    ids=["id", "moment", "token"])
def test_how_it_is_asked(questions, ends, follows, tokens):
    """The prompt ends where the id begins; of a time, its token stands before."""
    prompt, answer = model_card.example(dataclasses.replace(MODEL, questions=MODEL.questions | questions))
    assert prompt.endswith(ends) and prompt.startswith("<question>: ")
    assert answer == ("<GPS 1>." if questions.get("answer") else "1.")
    text = model_card.card(dataclasses.replace(MODEL, questions=MODEL.questions | questions))
    assert json.dumps(prompt, ensure_ascii=False) in text and follows in text and f'"max_tokens": {tokens}' in text
    assert ('"skip_special_tokens": false' in text) == ("not for this model" in text) == ("answer" in questions)


def test_what_servers_must_know():
    assert "Not by text" in card(prefix=False) and "Not by text" not in card()
    assert "for llama.cpp" not in card() and "`model-f16.gguf` is the same model" in card(gguf="model-f16.gguf")
    assert "a space in front" in card(gguf="model-f16.gguf", space=True)
    assert "a space in front" not in card(gguf="model-f16.gguf")
    assert "`model-f16.gguf`, for llama.cpp, holds the LLM alone" in card(gguf="model-f16.gguf", pointer=True)


def test_a_tokenizer_that_reads_the_end_otherwise():
    text = "<question>: POI id 3 POI id 4 <answer>: POI id "
    assert export.reads_prefix(byte_level_tokenizer(sample_prompts(0, 20), 700), text, "3.")
    assert not export.reads_prefix(words_tokenizer([text + "3."], 700), text, "3.")
