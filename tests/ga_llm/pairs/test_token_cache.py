"""Token ids on disk: equal to tokenizing the full texts, built once, keyed by all that decides them."""
import json
import pickle
from pathlib import Path

import forked
import numpy as np
import pytest

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.llm.backbone import load_tokenizer
from ga_llm.pairs import sft_data, token_cache
from geo_encoder import gps_tokens

PLACES = [1, 2, 3, 5, 6, 7]     # of mapping_csv, all below 10


def check_in(i, fields=prompts.FIELDS):
    place = PLACES[i % len(PLACES)]
    name = ["Café", "Deli / Bodega", "St. Mark's  Place", "駅", "Bar \"7\"", "Gym."][i % 6]
    time = f"2012-04-{1 + i % 28:02} 18:00:{i % 60:02}"
    return prompts.check_in(fields, time, 7, place, 40 + i / 7, -73.5, name, i % 6)


def write(path, pairs):
    records = [dict(zip(("question", "answer"), (head, prompts.ANSWER + tail))) for pair in pairs
               for head, tail in [pair.rsplit(prompts.ANSWER, 1)]]
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def ours(count=8, fields=prompts.FIELDS):
    """One user's pairs: each repeats the history of the one before."""
    visits = [check_in(i, fields) for i in range(3 * count)]
    time = "2012-04-04 09:00:00"
    ask = prompts.ask_poi(time, 7, 1, 13)
    return [prompts.join(prompts.question(7, [], visits[:3 * n], visits[3 * n:3 * n + 3], ask),
                         prompts.answer_poi(time, 7, PLACES[n % 6])) for n in range(count)]


FOREIGN = ["<question>: at POI id 5 <GPS 5><GPS 5>.<GPS 6> .  Then? <answer>:POI id 5", " <answer>: x",
           "no. marker. <answer>: twice <question>: <GPS 1> \t<answer>: At <GPS 2>. POI id 2.",
           ". . <GPS 1>. <answer>:"]
STAGE_1 = [prompts.join(prompts.question(7, [], [check_in(1)], [], prompts.ask_coordinates(3)),
                        prompts.answer_coordinates(40.123456, -73.5))]


EMBEDDED = Path(__file__).parents[3] / "models/smollm2-135m"


@pytest.fixture(params=["llama3", "sentencepiece", "embedded"])
def tokenizer(request, tiny_llama, mapping_csv):
    if request.param == "embedded" and not EMBEDDED.is_dir():
        pytest.skip("needs the embedded model: python tools/get_smollm2.py")
    tokenizer = load_tokenizer(str(EMBEDDED) if request.param == "embedded" else tiny_llama(request.param))
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(mapping_csv))
    return tokenizer


@pytest.mark.parametrize("pairs", [ours(), ours(fields=("poi",)), ours(fields=("clock", "gps")), FOREIGN, STAGE_1],
                         ids=["all fields", "without places", "short", "foreign", "stage 1"])
@pytest.mark.parametrize("max_length", [10_000, 90])
def test_equal_to_tokenizing_the_full_text(tokenizer, tmp_path, monkeypatch, pairs, max_length):
    """Also through the pieces alone, without the comparison that would fall back to whole texts."""
    monkeypatch.setattr(token_cache, "CHECKED_EVERY", 10**9)
    path = write(tmp_path / "a.json", [pairs[0], *pairs])
    data = token_cache.load(path, tokenizer, max_length, "m.csv")
    assert len(data) == len(pairs) + 1
    for i, pair in enumerate(sft_data.iterate_pairs(path)):
        ids, start = sft_data.encode(tokenizer, pair)
        cut = sft_data.truncate(ids, max_length, tokenizer.bos_token_id)
        assert data[i]["input_ids"].tolist() == cut, pair
        assert data[i]["answer_start"] == data.answer_starts[i] == start - (len(ids) - len(cut))
        assert (data.tokens[i], data.lengths[i]) == (len(ids), len(cut))


def test_a_check_in_is_tokenized_once(tokenizer):
    pairs = ours(20)
    pieces = token_cache.Pieces(tokenizer, "uint32")
    whole = sum(len(ids) for ids, _, _ in pieces.encode(pairs))
    assert pieces.tokenized < whole / 3
    before = pieces.tokenized
    pieces.encode(pairs)        # but for the tails, which hold questions and answers, all is known
    assert pieces.tokenized - before < before / 2


def test_a_vocabulary_that_joins_across_check_ins(tiny_llama, mapping_csv, tmp_path):
    """A token that holds ". " forbids that cut; the ids are the same as ever."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "</s>", ".Ġ"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(".", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(mapping_csv))
    pieces = token_cache.Pieces(tokenizer, "uint32")
    for pair, (ids, start, _) in zip(ours(), pieces.encode(ours())):
        assert (ids.tolist(), start) == sft_data.encode(tokenizer, pair)
    assert any(vocab[".Ġ"] in ids for ids, _, _ in pieces.encode(ours()))


def test_falls_back_to_whole_texts(tokenizer, tmp_path, monkeypatch, caplog):
    """Where pieces would give other tokens, a comparison with the whole text finds it."""
    split = token_cache.Pieces._split
    monkeypatch.setattr(token_cache.Pieces, "_split", lambda self, i, text: (
        [("", text[:4]), ("", text[4:])], split(self, i, text)[1]) if self.in_pieces else split(self, i, text))
    with caplog.at_level("INFO"):
        data = token_cache.load(write(tmp_path / "a.json", ours()), tokenizer, 10_000, "m.csv")
    assert "tokenized as wholes" in caplog.text
    assert [item["input_ids"].tolist() for item in data] == [sft_data.encode(tokenizer, pair)[0] for pair in ours()]


def test_built_once_and_again_when_anything_changes(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", ours())
    first = token_cache.load(path, tokenizer, 500, "m.csv")
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_build", None)
        assert token_cache.load(path, tokenizer, 500, "m.csv").folder == first.folder
    folders = {first.folder, token_cache.load(path, tokenizer, 501, "m.csv").folder}
    write(path, ours(7))
    folders.add(token_cache.load(path, tokenizer, 500, "m.csv").folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<GPS 99>"]}, replace_extra_special_tokens=False)
    folders.add(token_cache.load(path, tokenizer, 500, "m.csv").folder)
    assert len(folders) == 4
    elsewhere = token_cache.load(path, tokenizer, 500, "m.csv", tmp_path / "cache")
    assert elsewhere.folder.parent == tmp_path / "cache"
    assert pickle.loads(pickle.dumps(elsewhere))[3]["input_ids"].tolist() == elsewhere[3]["input_ids"].tolist()


def test_one_of_several_processes_builds(tiny_llama, mapping_csv, tmp_path):
    path = write(tmp_path / "a.json", ours(40))
    script = tmp_path / "load.py"
    script.write_text("import sys, logging; logging.basicConfig(level=20)\n"
                      "from ga_llm.llm import backbone; from ga_llm.pairs import token_cache\n"
                      "from geo_encoder import gps_tokens as g\nt = backbone.load_tokenizer(sys.argv[1])\n"
                      "g.add_gps_tokens(t, g.read_gps_mapping(sys.argv[2]))\n"
                      "print(len(token_cache.load(sys.argv[3], t, 99, 'm')), flush=True)")
    logs = [tmp_path / "one", tmp_path / "other"]
    processes = [forked.launch(tmp_path, [script, tiny_llama(), mapping_csv, path], log) for log in logs]
    runs = [forked.end(process, log) for process, log in zip(processes, logs)]
    assert [(run.code, run.out) for run in runs] == [(0, "40\n"), (0, "40\n")]
    assert sum(run.err.count("tokenized 40 pairs") for run in runs) == 1


def test_an_interrupted_build_is_invisible_and_made_anew(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", ours())
    with monkeypatch.context() as patch:
        patch.setattr(token_cache.np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            token_cache.load(path, tokenizer, 500, "m.csv")
    assert not list(tmp_path.glob("tokens-*"))
    assert len(token_cache.load(path, tokenizer, 500, "m.csv")) == len(ours())
    assert not list(tmp_path.glob(".tokens-*.partial"))


def test_mistakes(tokenizer, tmp_path):
    path = write(tmp_path / "a.json", [*ours(), ours()[0].replace("<GPS 1>", "<GPS 404>")])
    with pytest.raises(UserError, match="a.json, pair 8: <GPS 404> has no row in m.csv"):
        token_cache.load(path, tokenizer, 500, "m.csv")
    with pytest.raises(UserError, match="pair 0: the answer alone has .* raise --model_max_length"):
        token_cache.load(write(tmp_path / "b.json", ours()), tokenizer, 20, "m.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another folder with --cache_dir"):
        token_cache.load(write(tmp_path / "b.json", ours()), tokenizer, 500, "m.csv", tmp_path / "file" / "x")


@pytest.mark.parametrize("pairs", [ours(), ours(fields=("poi",)), ours(fields=("clock", "poi", "gps")), FOREIGN],
                         ids=["all fields", "without places", "clock", "foreign"])
@pytest.mark.parametrize("max_length", [10_000, 40])
def test_tokens_of_poi_ids_are_marked(tokenizer, tmp_path, monkeypatch, pairs, max_length):
    """By the offsets of the whole text: a token is marked if it holds a digit of a POI id, and is not the first."""
    monkeypatch.setattr(token_cache, "CHECKED_EVERY", 10**9)
    path = write(tmp_path / "a.json", pairs)
    try:
        data = token_cache.load(path, tokenizer, max_length, "m.csv", poi_ids=True)
    except UserError as error:
        assert "the answer alone has" in str(error) and max_length == 40
        return
    for i, pair in enumerate(sft_data.iterate_pairs(path)):
        encoding = tokenizer(pair, return_offsets_mapping=True)
        spans = [match.span(1) for match in prompts.POI_ID.finditer(pair)]
        marks = [any(first < end and begin < last for first, last in spans)
                 for begin, end in encoding["offset_mapping"]]
        marks += [False] * (len(sft_data.encode(tokenizer, pair)[0]) - len(marks))
        if len(marks) > max_length:
            ids = sft_data.encode(tokenizer, pair)[0]
            marks = sft_data.cut(marks, max_length, ids[0] == tokenizer.bos_token_id)
        assert data[i]["targets"].tolist() == [False, *marks[1:]], pair
    assert any(item["targets"].any() for item in data)
    answers = token_cache.load(path, tokenizer, max_length, "m.csv", poi_ids=True, answers_alone=True)
    assert answers.folder == data.folder
    for alone, item in zip(pickle.loads(pickle.dumps(answers)), data):
        in_answer = np.arange(len(item["input_ids"])) >= item["answer_start"]
        assert (alone["targets"] == item["targets"] & in_answer).all()
    plain = token_cache.load(path, tokenizer, max_length, "m.csv")
    assert plain.folder != data.folder and "targets" not in plain[0]
    assert plain[0]["input_ids"].tolist() == data[0]["input_ids"].tolist()
