"""What is on disk when an evaluation is killed, and what is read when it is started again."""
import json

import numpy as np
import pytest

from ga_llm.base import prompts
from ga_llm.base.cli import UserError
from ga_llm.evaluation import predictions
from ga_llm.evaluation.ranking import Ranked
from ga_llm.pairs import spelling


def prompt(pair, target):
    time = f"2012-04-04 09:00:0{pair}"
    text = prompts.join(prompts.question(7, [], [], ["POI id 1."], prompts.ask_poi(time, 7, 0, 9)),
                        prompts.answer_poi(time, 7, target))
    return spelling.TestPrompt(pair, text[:spelling.answer_id(text)[0]], target, [1, 2], 2, True)


PROMPTS = [prompt(i, i + 3) for i in range(4)]
RESULTS = [Ranked(1, [(3, -0.123456), (4, -2.0)], np.array([0, 1])), Ranked(None, [(9, None)], np.array([2, 3])),
           Ranked(7, [(5, -1.0)], np.array([4, 5])), Ranked(None, [], np.array([6, 7]))]


def written(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").open()]


def test_records(tmp_path):
    store = predictions.Store(tmp_path, "k")
    store.add(PROMPTS[2:], RESULTS[2:])
    store.add(PROMPTS[:2], RESULTS[:2])
    found = store.ranking(PROMPTS)
    assert found.ranks.tolist() == [1, np.inf, 7, np.inf] and found.tops.tolist() == [3, 9, 5, -1]
    assert store.finish(PROMPTS, [0.5, np.nan, 1.23456, np.nan], {"n": 4}) == ["metrics.json", "predictions.jsonl"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"n": 4}
    assert written(tmp_path)[0] == {"pair": 0, "user": 7, "time": "2012-04-04 09:00:00", "target": 3, "current": 1,
                                    "fits": True, "rank": 1, "top": [[3, -0.1235], [4, -2.0]], "km": 0.5}
    assert [r["km"] for r in written(tmp_path)] == [0.5, None, 1.235, None]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.json", "predictions.jsonl"}


def test_a_damaged_beginning_is_refused(tmp_path):
    store = predictions.Store(tmp_path, "k")
    store.partial.write_text("{]\n")
    with pytest.raises(UserError, match="partial: damaged; delete it"):
        predictions.Store(tmp_path, "k")


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_goes_on_after_a_kill_in_the_middle_of_a_line(tmp_path, cut):
    whole = predictions.Store(tmp_path / "whole", "k", (3, 4), 4)
    whole.add(PROMPTS, RESULTS)
    whole.finish(PROMPTS, [0.0] * 4, {})

    killed = predictions.Store(tmp_path / "killed", "k", (3, 4), 4)
    killed.add(PROMPTS[:2], RESULTS[:2])
    killed.add(PROMPTS[2:3], RESULTS[2:3])
    content = killed.partial.read_bytes()
    killed.partial.write_bytes(content[:-cut])
    again = predictions.Store(tmp_path / "killed", "k", (3, 4), 4)
    assert set(again.done) == {0, 1}
    again.add(PROMPTS[:2], [None, None])            # a chunk may hold pairs that are done
    again.add(PROMPTS[2:], RESULTS[2:])
    assert again.finish(PROMPTS, [0.0] * 4, {}) == ["metrics.json", "predictions.jsonl", "log_probabilities.npy"]
    for name in ("predictions.jsonl", "log_probabilities.npy"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "killed/log_probabilities.npy"), np.arange(8).reshape(4, 2))


@pytest.mark.parametrize("lost", ["", "records", "rows", "half a row"])
def test_parts_of_several_processes(tmp_path, lost):
    """Read by the first, whoever has written them; a record without its row counts as none, and a row without it."""
    whole, folder = predictions.Store(tmp_path / "whole", "k", (3, 4), 4), tmp_path / "parts"
    whole.add(PROMPTS, RESULTS)
    whole.finish(PROMPTS, [0.0] * 4, {})
    first = predictions.Store(folder, "k", (3, 4), 4)
    others = [predictions.Store(folder, "k", (3, 4), 4, part=part) for part in (1, 10)]
    for store, prompt, result in zip([others[1], first, others[0], others[0]], PROMPTS, RESULTS):
        store.add([prompt], [result])
    if lost == "records":
        others[0].partial.unlink()
    elif lost:
        others[0].rows.write_bytes(others[0].rows.read_bytes()[:0 if lost == "rows" else 12])
    again = predictions.Store(folder, "k", (3, 4), 4)
    assert set(again.done) == {"": {0, 1, 2, 3}, "half a row": {0, 1, 2}}.get(lost, {0, 1})
    rest = predictions.Store(folder, "k", (3, 4), 4, part=1, done=dict.fromkeys(again.done))
    if len(again.done) < 4:
        with pytest.raises(UserError, match=f"{4 - len(again.done)} pairs, which are not there; give an --output_dir"):
            again.check(PROMPTS)
    rest.add(PROMPTS, RESULTS)
    again.read()
    again.check(PROMPTS)
    assert again.finish(PROMPTS, [0.0] * 4, {})
    for name in ("predictions.jsonl", "log_probabilities.npy"):
        assert (tmp_path / "whole" / name).read_bytes() == (folder / name).read_bytes()
    assert not list(folder.glob(".*"))


def test_pairs_left_out_have_no_probabilities(tmp_path):
    store = predictions.Store(tmp_path, "k", (3, 4), 4)
    store.add(PROMPTS[1:2], RESULTS[1:2])
    np.testing.assert_array_equal(store.table(), [[np.nan] * 2, [2, 3], [np.nan] * 2, [np.nan] * 2])
    store.rows.unlink()
    assert np.isnan(predictions.Store(tmp_path, "k", (3, 4), 4).table()).all()


def test_another_evaluation_begins_anew_and_loses_nothing(tmp_path):
    predictions.Store(tmp_path, "a").add(PROMPTS[:1], RESULTS[:1])
    assert predictions.Store(tmp_path, "b").done == {}
    assert set(predictions.Store(tmp_path, "a").done) == {0}


def test_key(tmp_path):
    (tmp_path / "t.txt").write_text("a")
    (tmp_path / "m.safetensors").write_bytes(b"1")

    def key(**settings):
        return predictions.key(settings, [tmp_path / "t.txt"], [tmp_path])

    first = key(seed=1)
    assert first == key(seed=1) != key(seed=2)
    (tmp_path / "metrics.json").write_text("results do not count")
    assert key(seed=1) == first
    (tmp_path / "t.txt").write_text("b")
    second = key(seed=1)
    (tmp_path / "m.safetensors").write_bytes(b"12")
    assert len({first, second, key(seed=1)}) == 3
