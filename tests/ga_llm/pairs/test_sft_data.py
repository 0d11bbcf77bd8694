"""Left truncation, label masking, padding; the loss that results, for two tokenizers."""
import json

import numpy as np
import pytest
import torch

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.llm.backbone import load_llm, load_tokenizer
from ga_llm.pairs import sft_data

PAIR = prompts.join(
    prompts.question(7, [], ["2012-04-03 18:00:09 user 7 POI id 31 <GPS 31>."],
                     ["2012-04-04 08:01:00 user 7 POI id 5."], prompts.ask_poi("2012-04-04 09:00:00", 7, 0, 40)),
    prompts.answer_poi("2012-04-04 09:00:00", 7, 12))


@pytest.fixture(params=["llama3", "sentencepiece"])
def tokenizer(request, tiny_llama):
    return load_tokenizer(tiny_llama(request.param))


def test_loss_on_the_answer_and_eos_alone(tokenizer):
    ids, start = sft_data.encode(tokenizer, PAIR)
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[start:-1]).strip() == "At 2012-04-04 09:00:00, user 7 will visit POI id 12."
    assert tokenizer.decode(ids[:start]).rstrip().endswith("<answer>:")
    assert ids[:-1] == tokenizer(PAIR)["input_ids"]


def test_truncation_keeps_bos_and_the_end():
    assert sft_data.truncate([5, 6, 7, 8], 3, bos=None) == [6, 7, 8]
    assert sft_data.truncate([1, 6, 7, 8], 3, bos=1) == [1, 7, 8]
    assert sft_data.truncate([1, 6], 3, bos=1) == [1, 6]


def test_collator_by_hand():
    batch = sft_data.AnswerCollator(pad_token_id=0)([{"input_ids": [1, 5, 6, 7, 2], "answer_start": 3},
                                                     {"input_ids": [1, 8, 2], "answer_start": 2}])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["logits_to_keep"] == 4     # position 1 predicts the first answer token, of the second row
    assert batch["shift_labels"].tolist() == [[-100, 7, 2, -100], [2, -100, -100, -100]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], [-100, 2, -100, -100]]


def test_loss_equals_the_plain_formulation(tiny_llama):
    """Logits of the tail alone, mixed lengths: the same loss as labels over the whole sequence, one by one."""
    tokenizer, model = load_tokenizer(tiny_llama()), load_llm(tiny_llama(), 2048, "sdpa", torch.float32).eval()
    items = [dict(zip(("input_ids", "answer_start"), sft_data.encode(tokenizer, pair)))
             for pair in (PAIR, PAIR.replace("user 7", "user 1234"))]
    loss = model(**sft_data.AnswerCollator(tokenizer.pad_token_id)(items)).loss
    total = count = 0
    for item in items:
        ids, start = item["input_ids"], item["answer_start"]
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(log_probs[i - 1, ids[i]].item() for i in range(start, len(ids)))
        count += len(ids) - start
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("content, message", [
    ('[{"question": "a', "pair 0: not JSON"), ("{}", "JSON array"), ("[]", "at least one pair"),
    ('[{"question": "<question>: a"}]', "pair 0: expected texts"), ('[["a"]]', "pair 0: expected texts"),
    ('[{"question": "a", "answer": "<answer>: b"}, {"question": "a", "answer": "b"}]', "pair 1: no <answer>:"),
    (b'[{"question": "\xff", "answer": "b"}]', "not JSON"),
])
def test_bad_training_files(tmp_path, content, message):
    path = write(tmp_path / "train.json", content)
    with pytest.raises(UserError, match=message) as error:
        list(sft_data.iterate_pairs(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, message", [("a <answer>: b\nno marker\n", "line 2: no <answer>:"), ("", "empty"),
                                              (b"\xff\xfe", "UTF-8")])
def test_bad_test_files(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        sft_data.read_test_pairs(write(tmp_path / "test.txt", content), "process_llm_gps.py")


def test_pairs_are_read_whole(tmp_path):
    question, answer = PAIR.split(" <answer>:")
    path = write(tmp_path / "t.json", json.dumps([{"question": question, "answer": "<answer>:" + answer}]))
    assert list(sft_data.iterate_pairs(path)) == [PAIR]
    assert list(sft_data.iterate_pairs(write(tmp_path / "t.txt", f"{PAIR}\n{PAIR}\n"))) == [PAIR, PAIR]
    with pytest.raises(UserError, match="t.txt, line 2: no <answer>:"):
        list(sft_data.iterate_pairs(write(tmp_path / "t.txt", f"{PAIR}\nx\n")))


def test_gps_id_without_a_row():
    with pytest.raises(UserError, match="pair 0: <GPS 31> has no row in m.csv"):
        sft_data.check_places([PAIR], {"<GPS 1>", "<GPS 2>"}, "t.json", "m.csv")
    sft_data.check_places([PAIR], {"<GPS 31>"}, "t.json", "m.csv")


def test_loss_on_targets_alone():
    """Tokens 5 and 2 of the first pair, 8 of the second; the LLM computes logits from before the first of them on."""
    batch = sft_data.AnswerCollator(pad_token_id=0)([
        {"input_ids": [1, 4, 5, 6, 2], "answer_start": 3, "targets": np.array([False, False, True, False, True])},
        {"input_ids": [1, 7, 7, 8], "answer_start": 2, "targets": np.array([False, False, False, True])}])
    assert batch["logits_to_keep"] == 4
    assert batch["shift_labels"].tolist() == [[5, -100, 2, -100], [-100, 8, -100, -100]]
