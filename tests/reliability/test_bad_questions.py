"""Wrong question files, mappings, encoders, tokenizers and flags: training and evaluation use or refuse them."""
import contextlib
import gzip
import json
import shutil
from argparse import Namespace

import forked
import numpy as np
import pytest
import torch
from commands import DATA, FLAGS, MAPPING, PAIRS, README_FLAGS, SCRIPTS, evaluation
from harness import Result, call, refusal, snapshot
from make_tiny_llama import sample_prompts
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ga_llm.base import artifacts, json_text, prompts, writing
from ga_llm.base.artifacts import GCIM, METRICS, PREDICTIONS
from ga_llm.base.cli import UserError
from ga_llm.evaluation import ranking
from ga_llm.llm import backbone
from ga_llm.pairs import sft_data, spelling, token_cache
from ga_llm.training import common
from geo_encoder import gps_tokens, injection

pytestmark = pytest.mark.bulk
TEST = f"{DATA}/{artifacts.questions('test', 'sample', 2, False)}"
TRAIN = PAIRS[2]
ENCODER = "outputs/gcim/6/geo_encoder_merged.pth"
BESIDE = f"outputs/gcim/6/{GCIM.config}"
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
    text = (place / f"{output}.log").read_text()
    for log in (place / output).parent.glob("*.log*"):
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


def rows_of(table) -> list:
    """A table's rows under their names, for parametrize."""
    # Without ijson what is nested so deeply is no JSON.
    deep = pytest.mark.skipif(json_text.ijson is None, reason="needs ijson: pip install ijson")
    return [pytest.param(*row, id=name, marks=[deep] * (name in ("nested whole", "nested key")))
            for name, *row in table]


@pytest.mark.parametrize("make, names", rows_of(BAD_TRAINING))
def test_a_bad_training_file_is_refused(place, make, names):
    path = place / TRAIN
    content = make(json.loads(path.read_text()))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(place, train_here, 2, names=[TRAIN, *names])


def tokens(place, mapping=MAPPING, model="models/tiny", length=4096) -> list:
    """The training file's pairs as training reads them."""
    tokenizer = backbone.load_tokenizer(str(place / model))
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


@pytest.mark.parametrize("make", rows_of(GOOD_TRAINING))
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
    tokenizer = backbone.load_tokenizer(str(place / "models/tiny"))
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(place / MAPPING))
    for pair, (ids, start) in zip(sft_data.iterate_pairs(path), tokens(place), strict=True):
        whole, first = sft_data.encode(tokenizer, pair)
        cut = sft_data.truncate(whole, 4096, tokenizer.bos_token_id)
        assert (ids, start) == (cut, first - len(whole) + len(cut))
        assert tokenizer.decode(ids[start:-1]).strip() == pair.rpartition(prompts.ANSWER)[2].strip()


# Evaluation's question file. `make`: its four lines, each with its "\n", to the file's bytes.

def third(change):
    """The third line changed."""
    return lambda lines: "".join([*lines[:2], change(lines[2]), *lines[3:]]).encode()


def answering(text):
    """The third line with another answer."""
    return third(lambda line: line.rpartition("POI id")[0] + text + "\n")


def joined(change):
    return lambda lines: change("".join(lines).encode())


BAD_TESTS = [
    ("missing", lambda lines: None, ["not found"]),
    ("empty", lambda lines: b"", ["empty"]),
    ("blank lines", lambda lines: b" \r\n\n\t\n", ["no pairs"]),
    ("blank line in the middle", third(lambda line: "\n" + line), ["line 3", "<answer>:"]),
    ("no <answer>:", third(lambda line: line.replace(prompts.ANSWER, "")), ["line 3", "<answer>:"]),
    ("no answer", third(lambda line: line.partition(prompts.ANSWER)[0] + prompts.ANSWER + "\n"), ["line 3", "POI id"]),
    ("no POI id", answering("nowhere."), ["line 3", "POI id"]),
    ("negative", answering("POI id -5."), ["line 3", "POI id"]),
    ("other digits", answering("POI id ٣."), ["line 3", "POI id"]),
    ("in capitals", answering("POI ID 3."), ["line 3", "POI id"]),
    ("a fraction", answering("POI id 3.5."), ["line 3", "'.5.'", "line 1"]),
    ("other end", answering("POI id 3!"), ["line 3", "'!'", "line 1"]),
    ("no end", answering("POI id 3"), ["line 3", "''", "line 1"]),
    ("beyond 2^63", answering("POI id 9223372036854775808."), ["line 3", "digits"]),
    ("5000 digits", answering(f"POI id {'9' * 5000}."), ["line 3", "digits"]),
    ("5000 digits in the question", third(lambda line: line.replace("POI id ", "POI id " + "9" * 5000, 1)),
     ["line 3", "digits"]),
    ("UTF-16", lambda lines: "".join(lines).encode("utf-16"), ["UTF-8"]),
    ("latin-1", third(lambda line: line.replace("user", "Café", 1)) and (
        lambda lines: "".join(lines).replace("user", "Café", 1).encode("latin-1")), ["UTF-8"]),
    ("surrogates", lambda lines: "".join(lines).replace("user", "\ud800", 1).encode(errors="surrogatepass"), ["UTF-8"]),
    ("NUL bytes", joined(lambda text: text[:-700] + bytes(700)), ["line 4", "<answer>:"]),
    ("cut off", joined(lambda text: text[:-100]), ["line 4"]),
    ("gzip", joined(gzip.compress), ["UTF-8"]),
    ("training's", lambda lines: b"[\n  {\n", ["line 1", "<answer>:"]),
    ("<GPS 05>", third(lambda line: line.replace("<GPS ", "<GPS 0", 1)), ["pair 2", "<GPS 0", "no row"]),
    ("<GPS -1>", third(lambda line: line.replace("<GPS ", "<GPS -", 1)), ["pair 2", "<GPS -", "no row"]),
    ("<GPS 99999>", third(lambda line: line.replace("<GPS ", "<GPS 99999", 1)), ["pair 2", "<GPS 99999", "no row"]),
]


@pytest.mark.parametrize("make, names", [row[1:] for row in BAD_TESTS], ids=[row[0] for row in BAD_TESTS])
def test_a_bad_test_file_is_refused(place, make, names):
    path = place / TEST
    content = make(path.read_text().splitlines(keepends=True))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(place, evaluate_here, names=[TEST, *names])


def test_the_same_place_is_refused_by_training_and_evaluation(place):
    """`<GPS 07>` has a number that the mapping has, and a text that the tokenizer does not."""
    mapping = gps_tokens.read_gps_mapping(place / MAPPING)
    tokenizer = backbone.load_tokenizer(str(place / "models/tiny"))
    gps_tokens.add_gps_tokens(tokenizer, mapping)
    pair = "<question>: POI id 7 <GPS 07>. <answer>: POI id 7."
    with pytest.raises(UserError, match="pair 0: <GPS 07> has no row"):
        sft_data.check_places([pair], set(mapping.tokens), "t.txt", "m.csv")
    with pytest.raises(token_cache.UnknownPlace, match="<GPS 07>"):
        token_cache.Pieces(tokenizer, "uint32").encode([pair])


GOOD_TESTS = [
    ("CRLF", joined(lambda text: text.replace(b"\n", b"\r\n"))),
    ("BOM", joined(lambda text: b"\xef\xbb\xbf" + text)),
    ("no last line feed", joined(bytes.rstrip)),
    ("blank lines at the end", joined(lambda text: text + b"\r\n\n \n")),
    ("leading zeros in an answer", third(lambda line: line[:line.rindex("POI id") + 7] + "00"
                                         + line[line.rindex("POI id") + 7:])),
    ("blanks behind the answer", third(lambda line: line.rstrip() + " \t \n")),
]


@pytest.mark.parametrize("make", [row[1] for row in GOOD_TESTS], ids=[row[0] for row in GOOD_TESTS])
def test_a_test_file_of_another_make_gives_the_same_ranks(place, ranked, make):
    (place / TEST).write_bytes(make((place / TEST).read_text().splitlines(keepends=True)))
    assert evaluate_here(place).code == 0
    assert predicted(place) == ranked


@pytest.mark.parametrize("space", ["\u2028", "\u2029", "\x85", "\f", "\v", "\x1c", "\x1e", "\r", "\0", "\u200b"],
                         ids=ascii)
def test_what_unicode_calls_the_end_of_a_line_does_not_cut_a_pair(place, space):
    lines = (place / TEST).read_text().split("\n")
    lines[1] = lines[1].replace("user", f"{space}user", 3)
    (place / TEST).write_bytes("\n".join(lines).encode())
    assert sft_data.read_test_pairs(place / TEST, "…") == lines[:4]


OTHER_TARGETS = {"unknown": 99_999, "beyond 2^31": 2**31 + 5, "of 18 digits": 10**18 - 1}


@pytest.mark.parametrize("poi", OTHER_TARGETS.values(), ids=list(OTHER_TARGETS))
def test_a_target_without_a_row_is_a_miss(place, ranked, poi):
    path = place / TEST
    path.write_bytes(answering(f"POI id {poi}.")(path.read_text().splitlines(keepends=True)))
    assert evaluate_here(place).code == 0
    found = predicted(place)
    assert [found[i] for i in (0, 1, 3)] == [ranked[i] for i in (0, 1, 3)]
    assert found[2][1:3] == [poi, None] and found[2][4] == ranked[2][4]
    report = json.loads((place / CHECKPOINT / METRICS).read_text())
    assert report["n"] == 4 and report["all"]["model"]["Acc@1"]["value"] == sum(row[2] == 1 for row in found) / 4


@pytest.mark.parametrize("test_lines", [1, 2])
def test_few_pairs_are_enough(place, ranked, test_lines):
    lines = (place / TEST).read_text().splitlines(keepends=True)
    (place / TEST).write_text("".join(lines[:test_lines]))
    assert evaluate_here(place).code == 0
    assert predicted(place) == ranked[:test_lines]


def test_other_wordings_are_ranked(place):
    """Two answers (the last counts), no <question>:, 700 check-ins, neither user nor time."""
    many = "POI id 5 <GPS 5>. " * 700
    texts = ["<question>: POI id 5. <answer>: POI id 5. POI id 7? <answer>: POI id 3.", "POI id 5 <answer>:POI id 4.",
             f"<question>: {many} Next? <answer>: it is POI id 6.", "<answer>: POI id 8."]
    (place / TEST).write_text("\n".join(texts))
    assert evaluate_here(place).code == 0
    assert [row[1] for row in predicted(place)] == [3, 4, 6, 8]
    assert [row[3] for row in predicted(place)] == [True, True, False, True]
    assert all(1 <= row[2] <= 100 for row in predicted(place))


# The GPS mapping. `make`: its rows, [[id, latitude, longitude], …], as texts, to the file's bytes.

def table(rows, header="GPS_id,Latitude,Longitude", by=",", end="\n") -> bytes:
    return "".join(line + end for line in [header.replace(",", by), *(by.join(row) for row in rows)]).encode()


def cell(column, value, row=4):
    """One cell of the fifth row, which is line 6, with another value."""
    def make(rows):
        rows[row][column] = value
        return table(rows)
    return make


BAD_MAPPINGS = [
    ("missing", lambda rows: None, ["not found"]),
    ("empty", lambda rows: b"", ["empty"]),
    ("blank lines", lambda rows: b"\n\n", ["not a CSV file"]),
    ("header alone", lambda rows: table([]), ["no rows"]),
    ("no header", lambda rows: table(rows[1:], ",".join(rows[0])), ["no column GPS_id"]),
    ("semicolons", lambda rows: table(rows, by=";"), ["no column GPS_id"]),
    ("tabs", lambda rows: table(rows, by="\t"), ["no column GPS_id"]),
    ("decimal commas", lambda rows: table([[part.replace(".", ",") for part in row] for row in rows]),
     ["more cells than the header"]),
    ("a decimal comma", cell(1, "35,6"), ["not a CSV file"]),
    ("a cell too many", lambda rows: table([[*row, "0"] for row in rows]), ["more cells than the header"]),
    ("latitude and longitude swapped", lambda rows: table([[i, b, a] for i, a, b in rows]), ["line 2", "Latitude"]),
    ("no Longitude", lambda rows: table([row[:2] for row in rows], "GPS_id,Latitude"), ["no column Longitude"]),
    ("a row twice", lambda rows: table([*rows, rows[4]]), [f"line {78 + 1}", "twice"]),
    ("id twice as 3 and 3.0", lambda rows: table([*rows, [rows[4][0] + ".0", *rows[4][1:]]]), ["line 79", "twice"]),
    ("id missing", cell(0, ""), ["line 6", "GPS_id"]), ("id NaN", cell(0, "nan"), ["line 6", "GPS_id"]),
    ("id inf", cell(0, "inf"), ["line 6", "GPS_id"]), ("id negative", cell(0, "-1"), ["line 6", "GPS_id"]),
    ("id a fraction", cell(0, "3.5"), ["line 6", "GPS_id"]), ("id text", cell(0, "x"), ["line 6", "GPS_id"]),
    ("id beyond 2^53", cell(0, str(2**53 + 1)), ["line 6", "GPS_id"]),
    ("id beyond 2^63", cell(0, str(2**63)), ["line 6", "GPS_id"]),
    ("id beyond 2^64", cell(0, str(2**64)), ["line 6", "GPS_id"]),
    ("id 1e300", cell(0, "1e300"), ["line 6", "GPS_id"]), ("id of 400 digits", cell(0, "9" * 400), ["digits"]),
    ("id True", cell(0, "True"), ["line 6", "GPS_id"]), ("id hexadecimal", cell(0, "0x1F"), ["line 6", "GPS_id"]),
    ("latitude NaN", cell(1, "nan"), ["line 6", "Latitude"]), ("latitude inf", cell(1, "-inf"), ["line 6", "Latitude"]),
    ("latitude 90.1", cell(1, "90.1"), ["line 6", "Latitude"]), ("latitude text", cell(1, "N 3"), ["line 6"]),
    ("longitude -181", cell(2, "-181"), ["line 6", "Longitude"]), ("longitude ''", cell(2, ""), ["line 6"]),
    ("line number behind blank lines", lambda rows: table(rows[:4]) + b"\n\n" + b"x,1,2\n", ["line 8", "GPS_id"]),
    ("open quote", cell(0, '"3'), ["not a CSV file"]),
    ("NUL bytes", lambda rows: table(rows)[:-500] + bytes(500), ["line"]),
    ("UTF-16", lambda rows: table(rows).decode().encode("utf-16"), ["not a CSV file"]),
    ("gzip under another name", lambda rows: gzip.compress(table(rows)), ["not a CSV file"]),
    ("of another city", lambda rows: table([row for row in rows if int(row[0]) % 3]), ["pair", "no row"]),
]


def rewrite(place, make):
    path = place / MAPPING
    content = make([line.split(",") for line in path.read_text().splitlines()[1:]])
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("run", [evaluate_here, train_here], ids=["evaluation", "training"])
@pytest.mark.parametrize("make, names", [row[1:] for row in BAD_MAPPINGS], ids=[row[0] for row in BAD_MAPPINGS])
def test_a_bad_mapping_is_refused(place, run, make, names):
    rewrite(place, make)
    refused(place, run, *([2] if run is train_here else []), names=[MAPPING, *names])


@pytest.mark.parametrize("name", ["folder", "folder.csv", "cut.csv.gz", "text.csv.gz"])
def test_a_mapping_that_is_no_file_is_refused(place, name):
    if name.startswith("folder"):
        (place / name).mkdir()
    else:
        whole = (place / MAPPING).read_bytes()
        (place / name).write_bytes(gzip.compress(whole)[:-20] if name.startswith("cut") else whole)
    refused(place, evaluate_here, "--gps_mapping_path", name, names=[name])
    refused(place, train_here, 1, "--gps_mapping_path", name, names=[name])


GOOD_MAPPINGS = [
    ("columns in another order", lambda rows: table([[b, i, a] for i, a, b in rows], "Longitude,GPS_id,Latitude")),
    ("a comma behind each row", lambda rows: table([[*row, ""] for row in rows])),
    ("rows in another order", lambda rows: table(rows[::-1])),
    ("extra columns", lambda rows: table([["x", *row, "y,z"] for row in rows],
                                         "a,GPS_id,Latitude,Longitude,b,c")),
    ("BOM", lambda rows: b"\xef\xbb\xbf" + table(rows)),
    ("CRLF", lambda rows: table(rows, end="\r\n")),
    ("quotes", lambda rows: table([[f'"{part}"' for part in row] for row in rows])),
    ("blank lines", lambda rows: table(rows, end="\n\n")),
    ("ids as 3.0", lambda rows: table([[i + ".0", a, b] for i, a, b in rows])),
    ("ids as 007", lambda rows: table([["00" + i, a, b] for i, a, b in rows])),
]


@pytest.mark.parametrize("make", [row[1] for row in GOOD_MAPPINGS], ids=[row[0] for row in GOOD_MAPPINGS])
def test_a_mapping_of_another_make_gives_the_same_places(place, make):
    def places():
        mapping = gps_tokens.read_gps_mapping(place / MAPPING)
        return sorted(zip(mapping.ids.tolist(), mapping.latitude, mapping.longitude))
    expected = places()
    rewrite(place, make)
    assert places() == expected and all(isinstance(i, int) for i, _, _ in places())


def test_a_compressed_mapping_gives_the_same_ranks(place, ranked):
    (place / "m.csv.gz").write_bytes(gzip.compress((place / MAPPING).read_bytes()))
    assert evaluate_here(place, "--gps_mapping_path", "m.csv.gz").code == 0
    assert predicted(place) == ranked


def test_large_ids_take_no_memory(place):
    """Ids of 2^31 and 2^40 are places like any other; the base model ranks them, for no checkpoint knows them."""
    rewrite(place, lambda rows: table([*rows, [str(2**31), "35.5", "139.5"], [str(2**40), "35.6", "139.6"]]))
    (place / TEST).write_text(f"<question>: POI id 5 <GPS {2**40}>. Next? <answer>: POI id {2**40}.\n")
    assert evaluate_here(place, "--test_type", "projector").code == 0
    record = json.loads((place / CHECKPOINT / "projector" / PREDICTIONS).read_text())
    assert record["target"] == 2**40 and record["rank"] >= 1 and record["km"] is not None


def test_a_mapping_with_other_places_than_the_checkpoint_is_refused(place):
    rewrite(place, lambda rows: table([*rows, ["500", "35.5", "139.5"]]))
    refused(place, evaluate_here, names=[CHECKPOINT, "--gps_mapping_path"])


# Encoder files. `make`: the weights, the path to write to; the JSON stays as it is.

def saved(change):
    def make(weights, path):
        torch.save(change(weights), path)
    return make


FIRST = "gps_embed_model.gps_embedding.weight"
BAD_ENCODERS = [
    ("missing", lambda weights, path: None, ["not found"]),
    ("folder", lambda weights, path: path.mkdir(), ["folder"]),
    ("empty", lambda weights, path: path.write_bytes(b""), ["empty"]),
    ("text", lambda weights, path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), ["not a file of"]),
    ("safetensors under another name", lambda weights, path: save_file(weights, path), ["not a file of weights"]),
    ("list", saved(lambda weights: list(weights.values())), ["tensors by name"]),
    ("nested", saved(lambda weights: {"state_dict": weights}), ["tensors by name"]),
    ("no tensors", saved(lambda weights: {}), ["do not match", FIRST]),
    ("a key less", saved(lambda weights: {name: w for name, w in weights.items() if "norm2" not in name}),
     ["do not match", "no gps_encoder.transformer_encoder.layers.0.norm2.weight"]),
    ("a key more", saved(lambda weights: weights | {"more": torch.ones(1)}), ["do not match", "no place for more"]),
    ("a key that is no name", saved(lambda weights: weights | {7: torch.ones(1)}), ["do not match", "7"]),
    ("LoRA not merged", saved(lambda weights: {name.replace("linear1.", "linear1.base_layer."): w
                                               for name, w in weights.items()}), ["do not match", "linear1"]),
    ("another width", saved(lambda weights: {name: w[..., :16] for name, w in weights.items()}), ["do not match"]),
    ("a cut table", saved(lambda weights: weights | {FIRST: weights[FIRST][:100]}), ["do not match", FIRST, "4096"]),
    ("a scalar", saved(lambda weights: weights | {FIRST: torch.tensor(1.0)}), ["do not match", FIRST]),
    ("NaN", saved(lambda weights: weights | {FIRST: weights[FIRST].index_fill(0, torch.tensor([7]), torch.nan)}),
     ["NaN"]),
    ("infinity", saved(lambda weights: weights | {FIRST: weights[FIRST] / 0}), ["NaN"]),
    ("integers", saved(lambda weights: {name: w.int() for name, w in weights.items()}), ["do not match", "int32"]),
    ("complex", saved(lambda weights: {name: w + 0j for name, w in weights.items()}), ["do not match", "complex64"]),
]


def cut(path, bytes_left):
    with path.open("r+b") as file:
        file.truncate(bytes_left)


BAD_ENCODERS += [(f"cut to {left:.0%}", lambda weights, path, left=left: (
    torch.save(weights, path), cut(path, int(path.stat().st_size * left))), ["not a file of weights"])
    for left in (0.001, 0.5, 0.999)]


def flip(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


BAD_ENCODERS.append(("a bit turned over", lambda weights, path: (torch.save(weights, path), flip(path)),
                     ["is damaged"]))


@pytest.mark.parametrize("make, names", [row[1:] for row in BAD_ENCODERS], ids=[row[0] for row in BAD_ENCODERS])
def test_a_bad_encoder_is_refused(place, make, names):
    path = place / ENCODER
    weights = torch.load(path)
    path.unlink()
    make(weights, path)
    refused(place, evaluate_here, names=[ENCODER, *names])


@pytest.mark.parametrize("make, names", [BAD_ENCODERS[i][1:] for i in (0, 4, 8, 15)],
                         ids=[BAD_ENCODERS[i][0] for i in (0, 4, 8, 15)])
def test_stage_2_refuses_it_too(place, make, names):
    path = place / ENCODER
    weights = torch.load(path)
    path.unlink()
    make(weights, path)
    refused(place, train_here, 2, names=[ENCODER, *names])


BAD_CONFIGS = [
    ("cut off", '{"hidden_size": 32, "ki', []), ("empty", "", []), ("null", "null", []), ("list", "[]", []),
    ("nested", "[" * 100_000, []), ("binary", b"\xff\xfe\0", []),
    ("unknown key", {"depth": 2}, ["depth"]), ("a key less", {"hidden_size": ...}, ["hidden_size"]),
    ("hidden_size text", {"hidden_size": "32"}, ["hidden_size"]),
    ("hidden_size 0", {"hidden_size": 0}, ["hidden_size"]),
    ("ngram text", {"ngram": "6"}, ["ngram"]), ("ngram 6.0", {"ngram": 6.0}, ["ngram"]),
    ("ngram true", {"ngram": True}, ["ngram"]), ("ngram null", {"ngram": None}, ["ngram"]),
    ("ngram 0", {"ngram": 0}, ["n-gram"]), ("ngram -1", {"ngram": -1}, ["n-gram"]),
    ("ngram 26", {"ngram": 26}, ["n-gram"]), ("ngram 12", {"ngram": 12}, ["n-gram"]),
    ("ngram 1000000", {"ngram": 1_000_000, "level": 1_000_000}, ["level"]),
    ("level 0", {"level": 0}, ["level"]), ("level NaN", {"level": float("nan")}, ["level"]),
    ("level 3", {"level": 3}, ["n-gram"]), ("level 10**30", {"level": 10**30}, ["level"]),
    ("unknown kind", {"kind": "spherical"}, ["spherical"]),
    ("kind a list", {"kind": ["hierarchical"]}, ["geo encoder"]),
]


@pytest.mark.parametrize("content, names", [row[1:] for row in BAD_CONFIGS], ids=[row[0] for row in BAD_CONFIGS])
def test_a_bad_encoder_configuration_is_refused(place, content, names):
    path = place / BESIDE
    if isinstance(content, dict):
        content = {key: value for key, value in (json.loads(path.read_text()) | content).items() if value is not ...}
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(place, evaluate_here, names=[BESIDE, *names])


@pytest.mark.parametrize("content, names", [
    ({"ngram": 5}, [FIRST, "(4096, 32)", "(1024, 32)"]), ({"ngram": 10}, [FIRST]),
    ({"kind": "fourier"}, ["frequencies"]), ({"kind": "fusion"}, ["fusion", "hierarchical"]),
    ({"hidden_size": 64}, ["width 64", "32"])], ids=lambda value: str(value)[:30])
def test_a_configuration_of_another_encoder_is_refused(place, content, names):
    path = place / BESIDE
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    refused(place, evaluate_here, names=[ENCODER, *names])


@pytest.mark.parametrize("change", [lambda w: w.half(), lambda w: w.double()], ids=["fp16", "fp64"])
def test_weights_of_another_precision_are_read(place, change):
    weights = torch.load(place / ENCODER)
    torch.save({name: change(w) for name, w in weights.items()}, place / ENCODER)
    result = evaluate_here(place, "--test_type", "projector")      # with the adapter they must be the training's own
    lines = (place / CHECKPOINT / "projector" / PREDICTIONS).read_text().splitlines()
    assert result.code == 0 and len(lines) == 4


# Token ids on disk, once they are built. `damage`: what happens to the folder.

def overwrite(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def reindexed(change):
    return lambda folder: np.save(folder / token_cache.INDEX, change(np.load(folder / token_cache.INDEX)))


DAMAGES = [
    ("ids cut off", overwrite("ids.bin", lambda data: data[:-2])),
    ("ids cut within one", overwrite("ids.bin", lambda data: data[:-1])),
    ("ids empty", overwrite("ids.bin", lambda data: b"")),
    ("ids too many", overwrite("ids.bin", lambda data: data * 2)),
    ("ids missing", lambda folder: (folder / "ids.bin").unlink()),
    ("index cut off", overwrite("index.npy", lambda data: data[:-8])),
    ("index empty", overwrite("index.npy", lambda data: b"")),
    ("index text", overwrite("index.npy", lambda data: b"no array")),
    ("index of a million rows", overwrite("index.npy", lambda data: data.replace(b"(4, 3)", b"(9999999999, 3)"))),
    ("index missing", lambda folder: (folder / "index.npy").unlink()),
    ("index without the last pair", reindexed(lambda index: index[:-1])),
    ("no pairs", reindexed(lambda index: index[:0])),
    ("index of another shape", reindexed(lambda index: index[:, :2])),
    ("index of floats", reindexed(lambda index: index.astype(float))),
    ("index out of order", reindexed(lambda index: index[[1, 0, 2, 3]])),
    ("answers out of place", reindexed(lambda index: index + [0, 0, 10**6])),
    ("about cut off", overwrite("about.json", lambda data: data[:40])),
    ("about a list", overwrite("about.json", lambda data: b"[]")),
    ("about empty", overwrite("about.json", lambda data: b"")),
    ("about without its type", overwrite("about.json", lambda data: data.replace(b"dtype", b"type"))),
    ("about of another type", overwrite("about.json", lambda data: data.replace(b"uint16", b"uint64"))),
    ("about missing", lambda folder: (folder / "about.json").unlink()),
]


@pytest.mark.parametrize("damage", [row[1] for row in DAMAGES], ids=[row[0] for row in DAMAGES])
def test_damaged_token_ids_are_noticed_and_made_again(place, damage):
    whole = tokens(place)
    folder, = place.glob(f"{DATA}/tokens-*")
    damage(folder)
    with pytest.raises(UserError, match=f"{folder.name}: damaged .*; delete it"):
        tokens(place)
    shutil.rmtree(folder)
    assert tokens(place) == whole


def test_training_refuses_damaged_token_ids(place):
    with contextlib.chdir(place):
        tokens(place)
    assert train_forked(place, 2).code == 0
    shutil.rmtree(place / "outputs/new")
    for folder in place.glob(f"{DATA}/tokens-*"):
        cut(folder / token_cache.IDS, 100)
    refusal(train_here(place, 2), f"{DATA}/tokens-", "damaged", "delete it")
    assert not (place / "outputs/new").exists()


# Tokenizers. Each is given random weights of its own, and evaluation ranks by the base model.

def model_of(place, tokenizer, name="own") -> str:
    """A random Llama with this tokenizer; the folder's name."""
    folder = place / name
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=4096)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():        # far from uniform, so that ranks differ
        parameter.data.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return name


def trained_tokenizer(pre_tokenizer, decoder, **options):
    """A BPE trained on prompts, with the usual special tokens."""
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    backend.train_from_iterator(sample_prompts(0, 200), trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return backend


def fast(backend, **options):
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)


def merging_digits():
    return fast(trained_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()))


def merging_digits_and_ends():
    """Its tokens end at spaces alone: "47." is one, and so is " 47"."""
    return fast(trained_tokenizer(pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(False, use_regex=False)]),
        decoders.ByteLevel()))


def merging_all():
    """Its tokens may hold spaces: "POI id 47" may be one."""
    return fast(trained_tokenizer(pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()))


def lowercasing():
    backend = trained_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    backend.normalizer = normalizers.Lowercase()
    return fast(backend)


def places_in_the_vocabulary():
    backend = trained_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    backend.add_tokens(["<GPS 3>"])
    return fast(backend)


def by_hand(place, name, pairs) -> list:
    """Each pair's rank of the target: log P of the text up to each id and what follows it, from the plain forward."""
    tokenizer = backbone.load_tokenizer(str(place / name))
    model = backbone.load_llm(str(place / name), 4096, "sdpa", torch.float32).eval()
    mapping = gps_tokens.read_gps_mapping(place / MAPPING)
    gps_tokens.add_gps_tokens(tokenizer, mapping, model)
    ranks = []
    for pair in pairs:
        start, target, end = spelling.answer_id(pair)
        log_p = {}
        for poi in mapping.ids.tolist():
            encoded = tokenizer(pair[:start] + str(poi) + end, return_offsets_mapping=True)
            ids, first = encoded["input_ids"], sft_data.first_after(encoded["offset_mapping"], start)
            with torch.no_grad():
                steps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            log_p[poi] = sum(steps[i - 1, ids[i]].item() for i in range(first, len(ids)))
        ranks.append(sum(value >= log_p[target] - 1e-4 for value in log_p.values()))
    return ranks


@pytest.mark.parametrize("make", [merging_digits, lowercasing, places_in_the_vocabulary, merging_digits_and_ends,
                                  merging_all])
def test_ranking_is_exact_or_refused_whatever_the_tokenizer(place, make):
    name, lines = model_of(place, make()), (place / TEST).read_text().splitlines()
    lines = [f"<question>:{line[-500:]}" for line in lines]
    (place / TEST).write_text("\n".join(lines))
    result = evaluate_here(place, "--test_type", "base", "--base_model", name, "--always_end", "True",
                           "--load_in_4bit", "False")
    if make in (merging_digits_and_ends, merging_all) and result.code:
        refusal(result, TEST)
        return
    assert result.code == 0, result.err
    folder = place / CHECKPOINT / "base_always_end"
    ranks = [json.loads(line)["rank"] for line in (folder / PREDICTIONS).read_text().splitlines()]
    assert ranks == by_hand(place, name, lines)


@pytest.mark.parametrize("make", [merging_digits, merging_digits_and_ends, merging_all])
def test_no_spelling_is_the_beginning_of_another(make):
    """Also without the ends, which a token may hold together with the last digit."""
    ids = [*range(130), 1234, 12345]
    spelled = spelling.Spelling(make(), ids, ".").tokens
    assert len(ranking.Trie(spelled).leaf.unique()) == len(ids)
    assert all(spelled[poi] for poi in ids)


def without_eos(folder):
    merging_digits().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))


def slow_only(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}))


def with_places_of_another_city(folder):
    tokenizer = merging_digits()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<GPS 4321>"]})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("change, names", [(without_eos, ["eos_token"]),
                                           (with_places_of_another_city, ["<GPS 4321>", "mapping"])])
def test_a_tokenizer_that_cannot_serve_is_refused(place, repo, change, names):
    shutil.copytree(repo / "models/tiny", place / "own")
    change(place / "own")
    refused(place, evaluate_here, "--test_type", "base", "--base_model", "own", names=names)
    refused(place, train_here, 1, "--model_name_or_path", "own", names=names)


def test_a_slow_tokenizer_is_refused(place, repo):
    shutil.copytree(repo / "models/tiny", place / "own")
    slow_only(place / "own")
    for result in (evaluate_here(place, "--test_type", "base", "--base_model", "own"),
                   train_here(place, 1, "--model_name_or_path", "own")):
        refusal(result, "own: no fast tokenizer")


# Flags.

BAD_TRAINING_FLAGS = [
    (2, "--lerning_rate 1", ["--lerning_rate", "--learning_rate"]), (2, "--frobnicate 1", ["--frobnicate"]),
    (2, "stray", ["stray"]), (2, "--learning_rate", ["--learning_rate"]), (2, "--learning_rate 1 2", ["2"]),
    *[(2, f"--{flag}=", [f"--{flag}", "required"]) for flag in ("model_name_or_path", "data_path", "gps_mapping_path",
                                                              "output_dir")],
    *[(stage, f"--{flag} {value}", [f"--{flag}"]) for stage, flag, values in (
        (1, "lora_r", "0 -1 x 1.5"), (2, "lora_r", "0"), (1, "lora_alpha", "0 -8"), (2, "lora_dropout", "-0.1 1 nan x"),
        (2, "model_max_length", "0 -1 15 1000000000 x"), (2, "num_train_epochs", "nan inf -1 0 x"),
        (2, "per_device_train_batch_size", "0 -2 1.5"), (2, "per_device_eval_batch_size", "0"),
        (2, "gradient_accumulation_steps", "0 -1"), (2, "save_steps", "0 -5 nan"), (2, "logging_steps", "0 -1 nan"),
        (2, "learning_rate", "x nan inf 0 -1"), (2, "weight_decay", "-1 nan"), (2, "warmup_steps", "-1 nan"),
        (2, "max_grad_norm", "-1 nan"), (2, "max_steps", "-5 0 x"), (2, "save_total_limit", "0 -1"),
        (2, "seed", "x -1 4294967296"), (2, "data_seed", "-1"), (2, "adam_beta1", "1 nan"),
        (2, "dataloader_num_workers", "-1"), (2, "tree_tokens", "-1 8192"),
        (1, "ngram", "0 -1 26 30 x"), (1, "quadkey_level", "0 5 31 60 x"), (1, "geo_encoder", "foo"),
        (1, "encoder_training", "foo"), (2, "trainable_params", "embd embed,nrm"),
        (2, "lr_scheduler_type", "foo"), (2, "save_strategy", "sometimes"), (2, "optim", "foo"),
        (2, "evaluation_strategy", "steps epoch"), (2, "report_to", "foo"), (2, "bf16", "maybe"), (2, "fp16", "2"),
        (2, "tf32", "perhaps"), (2, "use_full_attn", "maybe"), (2, "low_rank_training", "-1"),
        (2, "group_by_length", "often"), (2, "shared_prefix", "True"), (2, "load_best_model_at_end", "True"),
        (2, "deepspeed", "ds_configs/stage2.json"), (2, "geoencoder_path", "nowhere.pth"),
        (2, "resume_from_checkpoint", "nowhere"), (2, "dataloader_prefetch_factor", "2 0"),
    ) for value in values.split()],
]
NAMED_OTHERWISE = {"--evaluation_strategy": "--eval_strategy", "--warmup_steps": "warmup_steps",
                   "--geoencoder_path": "nowhere.pth"}


@pytest.mark.parametrize("stage, flags, names", BAD_TRAINING_FLAGS, ids=[row[1] for row in BAD_TRAINING_FLAGS])
def test_a_bad_training_flag_is_refused(place, stage, flags, names):
    flag, equals, _ = flags.partition("=")
    arguments = [flag, ""] if equals else flags.split()
    refused(place, train_here, stage, *arguments, names=[NAMED_OTHERWISE.get(name, name) for name in names])


def test_an_ngram_without_room_is_refused_at_level_30(place):
    refused(place, train_here, 1, "--ngram", "26", "--quadkey_level", "30", names=["--ngram"])


@pytest.mark.parametrize("content", [None, "", "{", "[]", "[" * 100_000, "\xff"], ids=lambda text: str(text)[:9])
def test_a_bad_deepspeed_file_is_refused(place, monkeypatch, content):
    monkeypatch.setenv("RANK", "0")
    if content is not None:
        (place / "ds.json").write_text(content, encoding="latin-1")
    refused(place, train_here, 2, "--deepspeed", "ds.json", names=["ds.json"])


BAD_EVALUATION_FLAGS = [
    ("--bach_size 8", ["--bach_size"]), ("stray", ["stray"]),
    *[(f"--{flag} {value}", [f"--{flag}"]) for flag, values in (
        ("batch_size", "0 -1 x 1.5"), ("seq_len", "0 1 -5 x 1000000000"), ("context_size", "0 1000000000"),
        ("limit", "0 -3 x"), ("seed", "-1 x 1e3 4294967296"), ("test_type", "foo"), ("dtype", "foo float16"),
        ("protocol", "foo"), ("decoding", "foo"), ("use_random_projector", "maybe"), ("always_end", "2"),
        ("flash_attn", "x"), ("load_in_4bit", "x")) for value in values.split()],
    ("--base_model= --model_path=", ["--base_model", "required"]), ("--output_dir=", ["--output_dir", "required"]),
    ("--dataset_name=", ["--dataset_name", "required"]), ("--dataset_name ../x", ["../x"]),
    ("--dataset_name nowhere", ["nowhere"]), ("--test_file ../../x", ["../../x", "not found"]),
    ("--test_file .", ["preprocessed", "folder"]), ("--data_path nowhere", ["nowhere", "not found"]),
    ("--gps_mapping_path nowhere.csv", ["nowhere.csv", "not found"]),
    ("--geoencoder_path nowhere.pth", ["nowhere.pth", "not found"]),
    ("--output_dir nowhere/deeper", ["nowhere/deeper"]), ("--base_model ./nowhere", ["./nowhere"]),
    ("--test_type projector --geoencoder_path=", ["--geoencoder_path"]),
    ("--full_table True --decoding sample", ["--full_table"]), ("--context_size 16384", ["--context_size"]),
    ("--compare a.jsonl", ["--compare"]), ("--compare a.jsonl, b.jsonl", ["--compare", "a.jsonl,"]),
    ("--compare a.jsonl b.jsonl,b.jsonl", ["--compare", "b.jsonl,b.jsonl"]),
]


@pytest.mark.parametrize("flags, names", BAD_EVALUATION_FLAGS, ids=[row[0] for row in BAD_EVALUATION_FLAGS])
def test_a_bad_evaluation_flag_is_refused(place, flags, names):
    arguments = [part for flag in flags.split() for part in ([flag[:-1], ""] if flag.endswith("=") else [flag])]
    refused(place, evaluate_here, *arguments, names=names)


@pytest.mark.parametrize("content, names", [
    (None, ["not found"]), ("", ["empty"]), ("UserId,PoiId\n1,2\n", ["TrajectoryId"]),
    ("UserId,PoiId,TrajectoryId,LocalTime,Split\n", ["no check-ins"]),
    ("UserId,PoiId,TrajectoryId,LocalTime,Split\n1,,3,t,train\n", []),
    ("UserId,PoiId,TrajectoryId,LocalTime,Split\n1,x,3,t,train\n", ["x"]),
    ("UserId,PoiId,TrajectoryId,LocalTime,Split\n1,2.5,3,t,train\n", []),
    ("UserId,PoiId,TrajectoryId,LocalTime,Split\n1,9223372036854775808,3,t,train\n", []),
    ('UserId,PoiId,TrajectoryId,LocalTime,Split\n1,"2,3,t,train\n', []), (b"\xff\xfe\0", []), (b"\x1f\x8b\0", []),
], ids=["missing", "empty", "other columns", "header alone", "NaN", "text", "fraction", "2^63", "open quote", "UTF-16",
        "gzip"])
def test_a_bad_sample_is_refused(place, content, names):
    """By the baselines, which stand beside every evaluation, and by STHGCN's protocol."""
    for file, arguments in (("train_sample.csv", []), ("sample.csv", ["--protocol", "sthgcn"])):
        path = place / DATA / file
        before = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        refused(place, evaluate_here, *arguments, names=[file, *names])
        refused(place, call, "tools/baselines.py", "-dataset_name", "sample", names=[file, *names])
        path.write_bytes(before)


def test_sthgcn_needs_users_and_times(place):
    lines = (place / TEST).read_text().splitlines()
    (place / TEST).write_text("\n".join([*lines, "<question>: POI id 3 <answer>: POI id 3."]))
    refused(place, evaluate_here, "--protocol", "sthgcn", names=["line 5", "sthgcn"])


RECORD = {"pair": 0, "user": 1, "time": "t", "target": 5, "fits": True, "rank": 2, "top": [[5, -1.0]], "km": 0.5}


@pytest.mark.parametrize("content, names", [
    (None, ["b.jsonl", "not found"]), ("", ["b.jsonl", "empty"]), ("\n", ["line 1", "not JSON"]),
    ('{"pair": 0, "us', ["line 1", "not JSON"]), ("[]", ["line 1"]), (b"\xff", ["line 1", "not JSON"]),
    ({"rank": 0}, ["line 1", "rank"]), ({"rank": -1}, ["rank"]), ({"rank": True}, ["rank"]), ({"rank": 1.5}, ["rank"]),
    ({"current": -1}, ["current"]), ({"km": float("nan")}, ["line 1"]), ({"km": -1}, ["km"]),
    ({"km": "1"}, ["km"]), ({"top": [[5]]}, ["top"]),
    ({"top": {}}, ["top"]), ({"pair": 7}, ["pair"]), ({"target": 6}, ["pair 0"]), ({"user": 2}, ["pair 0"]),
    (json.dumps(RECORD) + "\n" + json.dumps(RECORD), ["line 2", "twice"]), ("[" * 100_000, ["line 1"]),
], ids=lambda value: str(value)[:24])
def test_bad_predictions_are_not_compared(place, content, names):
    (place / "a.jsonl").write_text(json.dumps(RECORD) + "\n")
    if isinstance(content, dict):
        content = json.dumps(RECORD | content)
    if content is not None:
        (place / "b.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(place, call, "test_next_gps.py", "--compare", "a.jsonl", "b.jsonl", names=names)
    refused(place, call, "test_next_gps.py", "--compare", "b.jsonl", "a.jsonl", names=names)


@pytest.mark.parametrize("flags, names", [
    ("--hidden 0", ["--hidden"]), ("--hidden 33", ["--hidden"]), ("--layers -1", ["--layers"]),
    ("--heads 0", ["--heads"]), ("--kv_heads 3", ["--kv_heads"]), ("--kv_heads -1", ["--kv_heads"]),
    ("--vocab_size 0", ["--vocab_size"]), ("--max_position 0", ["--max_position"]), ("--seed x", ["--seed"]),
    ("--seed -1", ["--seed"]), ("--style foo", ["--style"]), ("--tie_embeddings maybe", ["--tie_embeddings"]),
    ("--intermediate 0", ["--intermediate"]),
    ("--corpus nowhere.txt", ["nowhere.txt"]), ("--corpus models", ["models"]),
    ("--corpus empty.txt", ["empty.txt"]), ("--output_dir models", ["models"]), ("--output_dir empty.txt", ["empty"])])
def test_a_bad_flag_of_make_tiny_llama_is_refused(place, flags, names):
    (place / "empty.txt").write_text("")
    refused(place, call, "tools/make_tiny_llama.py", "--output_dir", "made", *flags.split(), names=names)


# Through the scripts as torchrun starts them.

@pytest.mark.parametrize("stage, flags, names", [
    (1, "--lora_r 0", ["--lora_r"]), (1, "--geo_encoder foo", ["--geo_encoder"]), (1, "--ngram 26", ["--ngram"]),
    (2, "--num_train_epochs nan", ["--num_train_epochs"]), (2, "--deepspeed nowhere.json", ["nowhere.json"]),
    (2, "--trainable_params embd", ["--trainable_params"]), (2, "--gps_mapping_path nowhere.csv", ["nowhere.csv"]),
])
def test_a_started_training_is_refused(place, stage, flags, names):
    line = refused(place, train_forked, stage, *flags.split(), names=names)
    assert line.startswith("error: ")


@pytest.mark.parametrize("stage, flags, made", [
    (2, "--save_strategy epoch --per_device_train_batch_size 100", "checkpoint-1"),
    (2, "--trainable_params=", "checkpoint-1"),
    (1, "--save_steps 1 --model_max_length 16777216 --use_full_attn True", "1"),
    (1, "--encoder_training full --save_steps 0.5", "checkpoint-1"),
])
def test_unusual_flags_that_say_something_train(place, stage, flags, made):
    arguments = [part for flag in flags.split() for part in ([flag[:-1], ""] if flag.endswith("=") else [flag])]
    result = train_forked(place, stage, "--save_steps", "1", *arguments)
    assert result.code == 0, result.err
    assert (place / "outputs/new" / made).is_dir()


# Any bytes at all.

def mangled(data: bytes, draw) -> bytes:
    """A file with a few bytes changed, a part lost, doubled or blanked, or another's head."""
    data, at = bytearray(data), int(draw.integers(len(data)))
    length = int(draw.integers(1, 200))
    match draw.integers(6):
        case 0:
            data[at] = int(draw.integers(256))
        case 1:
            del data[at:]
        case 2:
            del data[at:at + length]
        case 3:
            data[at:at] = data[at:at + length]
        case 4:
            data[at:at + length] = bytes(len(data[at:at + length]))
        case 5:
            data[at:at + 1] = draw.choice([b"\"", b",", b"\n", b"<GPS ", b"POI id ", b"e9", b"\xff", b"[", b"-"])
    return bytes(data)


READ_BY_TRAINING = [TRAIN, MAPPING, ENCODER, BESIDE]
READ_BY_EVALUATION = [TEST, MAPPING, ENCODER, BESIDE, f"{DATA}/train_sample.csv"]


def works_or_is_refused(place, run, *arguments) -> bool:
    """Whether it works; a refusal leaves everything as it was."""
    before = snapshot(place)
    result = run(place, *arguments)
    if result.code == 0:
        return True
    refusal(result)
    assert {name: what for name, what in snapshot(place).items() if "/tokens-" not in name} == before
    return False


@pytest.mark.soak
@pytest.mark.parametrize("file", READ_BY_EVALUATION)
def test_evaluation_of_mangled_files(place, file):
    whole, draw, worked = (place / file).read_bytes(), np.random.default_rng(len(file)), 0
    for _ in range(150):
        (place / file).write_bytes(mangled(whole, draw))
        worked += works_or_is_refused(place, evaluate_here)
        for name in (METRICS, PREDICTIONS):
            (place / CHECKPOINT / name).unlink(missing_ok=True)
    assert worked < 150


@pytest.mark.soak
@pytest.mark.parametrize("file", READ_BY_TRAINING)
def test_training_setup_from_mangled_files(place, file):
    """Up to the model with its encoder; a file that is read must not make training fail later."""
    whole, draw, refused_ones = (place / file).read_bytes(), np.random.default_rng(len(file)), 0
    for _ in range(150):
        (place / file).write_bytes(mangled(whole, draw))
        with contextlib.chdir(place):
            try:
                args = Namespace(output_dir="outputs/new", process_index=0, dry_run=False, seed=1, shared_prefix=False,
                                 gps_mapping_path=MAPPING, model_name_or_path="models/tiny", cache_dir=None,
                                 data_path=TRAIN, model_max_length=512, low_rank_training=True, use_flash_attn=False,
                                 use_full_attn=True, bf16=False, load_in_4bit=False, loss_on="answer")
                setup = common.set_up(args)
                injection.attach_encoders(setup.model, injection.load_encoders(setup.model, setup.mapping,
                                                                               setup.token_ids, ENCODER))
                for item in setup.dataset:
                    assert 0 < item["answer_start"] < len(item["input_ids"]) <= 512
            except UserError as error:
                refused_ones += 1
                assert "\n" not in str(error) and (";" in str(error) or "`" in str(error)), error
            finally:
                writing._held.close()
        assert not (place / "outputs/new").exists()
        assert not list(place.rglob(".*"))
        for folder in (place / DATA).glob("tokens-*"):
            shutil.rmtree(folder)
    assert refused_ones
