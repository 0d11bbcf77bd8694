"""Bad input to training and evaluation: question files, mappings, encoders, tokenizers, flags. It works or is refused."""
import contextlib
import gzip
import json
import os
import shutil

import forked
import numpy as np
import pytest
import torch
from commands import DATA, FLAGS, MAPPING, PAIRS, README_FLAGS, SCRIPTS, evaluation
from harness import Result, call, refusal, snapshot
from make_tiny_llama import make_tiny_llama
from safetensors.torch import save_file

from ga_llm import artifacts, llm, prompts, sft_data, token_cache, training, writing
from ga_llm.artifacts import METRICS, PREDICTIONS
from ga_llm.cli import UserError
from geo_encoder import gps_tokens
from geo_encoder.weights import CONFIG

TEST = f"{DATA}/{artifacts.questions('test', 'sample', 2, False)}"
TRAIN = PAIRS[2]
ENCODER = "outputs/gcim/6/geo_encoder_merged.pth"
BESIDE = f"outputs/gcim/6/{CONFIG}"
CHECKPOINT = "outputs/llm/checkpoint-6"
LENGTH = ["--model_max_length", "4096"]


@pytest.fixture
def place(repo, tmp_path):
    """What training and evaluation read, cut to four pairs, free to be damaged; models are links."""
    for link in ("models", "best_conf", "ds_configs"):
        (tmp_path / link).symlink_to(repo / link)
    for folder in ("outputs/gcim/6", CHECKPOINT):
        shutil.copytree(repo / folder, tmp_path / folder)
    (tmp_path / DATA).mkdir(parents=True)
    for file in (MAPPING, f"{DATA}/train_sample.csv", f"{DATA}/sample.csv"):
        shutil.copy(repo / file, tmp_path / file)
    for file in (PAIRS[1], PAIRS[2]):
        (tmp_path / file).write_text(json.dumps(json.loads((repo / file).read_text())[:4]))
    (tmp_path / TEST).write_text("".join((repo / TEST).read_text().splitlines(keepends=True)[:4]))
    return tmp_path


def evaluate_here(place, *flags) -> Result:
    """An evaluation in this process, which lets go of its folder as if the process ended."""
    return call_and_leave(place, *evaluation(CHECKPOINT, "--seq_len", "512", *flags))


def train_here(place, stage, *flags) -> Result:
    return call_and_leave(place, SCRIPTS[stage], *README_FLAGS, "--output_dir", "outputs/new", *FLAGS[stage], *flags)


def call_and_leave(place, *command) -> Result:
    result = call(place, *command)
    with contextlib.chdir(place):
        writing._held.close()
    return result


def train_forked(place, stage, *flags, output="outputs/new") -> Result:
    process, = forked.start(place, stage, output, "--max_steps", "1", *flags)
    process.join(300)
    log = place / f"{output}.log"
    text = log.read_text()
    log.unlink()
    return Result(process.exitcode, "", text)


def refused(place, run, *arguments, names=()) -> str:
    """The line of a refusal that leaves everything as it was."""
    (place / CHECKPOINT / METRICS).write_text("of an earlier run")
    (place / CHECKPOINT / PREDICTIONS).write_text("of an earlier run")
    before = snapshot(place)
    line = refusal(run(place, *arguments), *names)
    after = {name: what for name, what in snapshot(place).items() if "/tokens-" not in name}
    assert after == before
    for folder in (place / DATA).glob("tokens-*"):
        token_cache.TokenDataset(folder)
    return line


def predicted(place) -> list:
    """What an evaluation has found: for each pair the target, its rank, and the best POIs."""
    lines = (place / CHECKPOINT / PREDICTIONS).read_text().splitlines()
    return [[record[key] for key in ("pair", "target", "rank", "fits")] + [[poi for poi, _ in record["top"]]]
            for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def ranked(repo):
    """The predictions that undamaged files give, of all pairs."""
    shutil.copytree(repo / CHECKPOINT, repo / "outputs/whole/checkpoint-6")
    assert call_and_leave(repo, *evaluation("outputs/whole/checkpoint-6", "--seq_len", "512", "--limit", "4")).code == 0
    folder = repo / "outputs/whole/checkpoint-6/limit4"
    lines = [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]
    return [[record[key] for key in ("pair", "target", "rank", "fits")] + [[poi for poi, _ in record["top"]]]
            for record in lines]


# Training's question file. `make`: the four pairs to the file's bytes.

def dumped(records, **options) -> bytes:
    return json.dumps(records, **options).encode()


def with_(**changes):
    """The third pair with other values; None: without that key."""
    def make(pairs):
        pairs[2] = {key: value for key, value in (pairs[2] | changes).items() if value is not Ellipsis}
        return dumped(pairs)
    return make


def replaced(old, new):
    """The third pair with another text in question and answer."""
    def make(pairs):
        pairs[2] = {key: value.replace(old, new, 1) for key, value in pairs[2].items()}
        return dumped(pairs)
    return make


BAD_TRAINING = [
    ("missing", lambda pairs: None, ["not found"]),
    ("empty", lambda pairs: b"", ["empty"]),
    ("white space", lambda pairs: b" \n", ["not JSON"]),
    ("no pairs", lambda pairs: b"[]", ["at least one pair"]),
    ("object", lambda pairs: b"{}", ["JSON array"]),
    ("object of pairs", lambda pairs: dumped({"data": pairs}), ["JSON array"]),
    ("number", lambda pairs: b"3", ["JSON array"]),
    ("cut in a string", lambda pairs: dumped(pairs)[:-700], ["pair 3", "not JSON"]),
    ("cut between pairs", lambda pairs: dumped(pairs[:3])[:-1] + b",", ["pair 3", "not JSON"]),
    ("cut behind a pair", lambda pairs: dumped(pairs[:3])[:-1], ["pair 3", "not JSON"]),
    ("JSON lines", lambda pairs: b"\n".join(map(dumped, pairs)), ["pair 0", "not JSON"]),
    ("behind the array", lambda pairs: dumped(pairs) + b"]", ["pair 4", "not JSON"]),
    ("two arrays", lambda pairs: dumped(pairs) * 2, ["pair 4", "not JSON"]),
    ("NaN", with_(answer=float("nan")), ["pair 2", "not JSON"]),
    ("trailing comma", lambda pairs: dumped(pairs)[:-1] + b",]", ["pair 4", "not JSON"]),
    ("single quotes", lambda pairs: str(pairs).encode(), ["pair 0", "not JSON"]),
    ("nested", lambda pairs: b"[" * 100_000, ["pair 0", "not JSON"]),
    ("nested whole", lambda pairs: b"[" * 100_000 + b"]" * 100_000, ["pair 0", "question and answer"]),
    ("question a number", with_(question=7), ["pair 2", "question and answer"]),
    ("question a list", with_(question=["a"]), ["pair 2", "question and answer"]),
    ("question an object", with_(question={"question": "a", "answer": "b"}), ["pair 2", "question and answer"]),
    ("no question", with_(question=...), ["pair 2", "question and answer"]),
    ("no answer", with_(answer=...), ["pair 2", "question and answer"]),
    ("answer null", with_(answer=None), ["pair 2", "question and answer"]),
    ("pair a text", lambda pairs: dumped([*pairs[:2], "text"]), ["pair 2", "question and answer"]),
    ("pair null", lambda pairs: dumped([*pairs[:2], None]), ["pair 2", "question and answer"]),
    ("no <answer>:", replaced(prompts.ANSWER, ""), ["pair 2", "no <answer>:"]),
    ("UTF-16", lambda pairs: json.dumps(pairs).encode("utf-16"), ["pair 0", "not JSON"]),
    ("latin-1", lambda pairs: json.dumps([{"question": "Café"}], ensure_ascii=False).encode("latin-1"),
     ["pair 0", "not JSON"]),
    ("NUL bytes", lambda pairs: dumped(pairs)[:-700] + bytes(700), ["pair 3", "not JSON"]),
    ("binary", lambda pairs: gzip.compress(dumped(pairs)), ["pair 0", "not JSON"]),
    ("<GPS 05>", replaced("<GPS ", "<GPS 0"), ["pair 2", "<GPS 0", "no row"]),
    ("<GPS -1>", replaced("<GPS ", "<GPS -"), ["pair 2", "<GPS -", "no row"]),
    ("<GPS 99999>", replaced("<GPS ", "<GPS 99999"), ["pair 2", "<GPS 99999", "no row"]),
    ("<GPS x>", replaced("<GPS ", "<GPS x"), ["pair 2", "<GPS x", "no row"]),
    ("<GPS ٣>", replaced("<GPS ", "<GPS ٣"), ["pair 2", "<GPS ٣", "no row"]),
    ("a number of 5000 digits", lambda pairs: dumped(pairs)[:-2] + b', "x": ' + b"9" * 5000 + b"}]",
     ["pair 3", "not JSON"]),
    ("an answer too long", with_(answer=f"{prompts.ANSWER} " + "1234567890" * 500), ["pair 2", "--model_max_length"]),
]


@pytest.mark.parametrize("make, names", [row[1:] for row in BAD_TRAINING], ids=[row[0] for row in BAD_TRAINING])
def test_a_bad_training_file_is_refused(place, make, names):
    path = place / TRAIN
    content = make(json.loads(path.read_text()))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(place, train_here, 2, names=[TRAIN, *names])


def tokens(place, mapping=MAPPING, model="models/tiny", length=4096) -> list:
    """The training file's pairs as training reads them."""
    tokenizer = llm.load_tokenizer(str(place / model))
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(place / mapping))
    data = token_cache.load(place / TRAIN, tokenizer, length, place / mapping)
    return [(item["input_ids"].tolist(), item["answer_start"]) for item in data]


GOOD_TRAINING = [
    ("extra keys", lambda pairs: dumped([{"id": 3, "x": [[{"question": 1}]], **pair, "answers": {"answer": 2}}
                                         for pair in pairs])),
    ("nested key", lambda pairs: dumped(pairs[:3])[:-1] + b', {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b", "
     + dumped(pairs[3])[1:] + b"]"),
    ("BOM", lambda pairs: b"\xef\xbb\xbf" + dumped(pairs)),
    ("CRLF", lambda pairs: dumped(pairs, indent=1).replace(b"\n", b"\r\n")),
    ("a large number", lambda pairs: dumped(pairs)[:-2] + b', "x": 9223372036854775807, "y": -1.5e300}]'),
    ("no escapes", lambda pairs: json.dumps(pairs, ensure_ascii=False).encode()),
    ("keys the other way", lambda pairs: dumped([dict(reversed(pair.items())) for pair in pairs])),
    ("the marker in the question", lambda pairs: dumped([
        {"question": pair["question"] + " " + prompts.ANSWER, "answer": pair["answer"].removeprefix(prompts.ANSWER)}
        for pair in pairs])),
    ("blanks between the parts", lambda pairs: dumped([
        {"question": pair["question"] + " \n", "answer": " \t" + pair["answer"]} for pair in pairs])),
]


@pytest.mark.parametrize("make", [row[1] for row in GOOD_TRAINING], ids=[row[0] for row in GOOD_TRAINING])
def test_a_training_file_of_another_make_gives_the_same_tokens(place, make):
    path = place / TRAIN
    expected = tokens(place)
    path.write_bytes(make(json.loads(path.read_text())))
    assert tokens(place) == expected


OTHER_TEXTS = [
    ("two answers", replaced(prompts.ANSWER, f"{prompts.ANSWER} POI id 1. {prompts.ANSWER}")),
    ("no <question>:", replaced(prompts.QUESTION, "")),
    ("lone surrogate", replaced("user", "\ud800 user")),
    ("NUL", replaced("user", "\0 user")),
    ("line separators", replaced("user", "\u2028 \u0085 \f \v \x1c \n user")),
    ("another wording", with_(question="Seen: POI id 5 <GPS 5><GPS 3>. Next?", answer=f"{prompts.ANSWER}POI id 3")),
    ("700 check-ins", replaced("History", "2012-04-04 08:01:00 user 7 POI id 5 <GPS 5> Bar, category id 3. " * 700)),
    ("an id of 20 digits", replaced("POI id ", "POI id 12345678901234567890")),
]


@pytest.mark.parametrize("make", [row[1] for row in OTHER_TEXTS], ids=[row[0] for row in OTHER_TEXTS])
def test_other_texts_are_tokenized_whole(place, make):
    path = place / TRAIN
    path.write_bytes(make(json.loads(path.read_text())))
    tokenizer = llm.load_tokenizer(str(place / "models/tiny"))
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(place / MAPPING))
    for pair, (ids, start) in zip(sft_data.iterate_pairs(path), tokens(place), strict=True):
        whole, first = sft_data.encode(tokenizer, pair)
        cut = sft_data.truncate(whole, 4096, tokenizer.bos_token_id)
        assert (ids, start) == (cut, first - len(whole) + len(cut))
        assert tokenizer.decode(ids[start:-1]).strip() == pair.rpartition(prompts.ANSWER)[2].strip()
