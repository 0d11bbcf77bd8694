"""JSON without orjson and ijson is the same as with them."""
import json
import random

import pytest

from ga_llm.base import json_text

VALUES = [None, True, 0, -2**63, "", [], {}, [[]], {"a": []}, {"a": {}, "b": [1, [2, {"c": None}]]},
          {"Café \u2028 \x7f": "\b\f\n\r\t\"\\/ \x00\x1f\u00a0 東京 \U0001f600"},
          [{"question": "a", "answer": "<b> & c"}] * 2]
RECORDS = [b'[{"question": "a", "answer": "b"}]', b' [ {"a" : "b"} ,\r\n{"a":"c","a":"d"}\t] \n', b"\xef\xbb\xbf[{}]",
           b"[]", b" [ ] ", b"{}", b"3", b'"x"',
           b'[1, null, "x", [{"a": 1}], {"a": "\\ud83d\\ude00 \\ud800 \xc3\xa9"}]']
BROKEN = [b"", b" ", b"[", b"[{}", b"[{},", b"[{},]", b"[,]", b"[{}]]", b"[{}] []", b"[{}]x", b"{} {}", b"[{} {}]",
          b"{}\n{}", b'[{"a": NaN}]', b'[{}, {"a": "\xff"}]', b"[{}]\xff", b"[{}, {'a': 1}]", b'[{}, {"a": "b\nc"}]',
          b'[{}, {"a": "b']


@pytest.fixture
def without(monkeypatch):
    def hide():
        monkeypatch.setattr(json_text, "orjson", None)
        monkeypatch.setattr(json_text, "ijson", None)
    return hide


def read(path):
    """The texts that each record holds, and whether the file is JSON to its end."""
    found = []
    try:
        for record in json_text.records(path):
            found.append({key: value for key, value in record.items() if isinstance(value, str)})
    except ValueError as error:
        assert str(error)
        return found, False
    return found, True


@pytest.mark.parametrize("indented", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_the_same_bytes(without, value, indented):
    pytest.importorskip("orjson")
    expected = json_text.dumps(value, indented)
    without()
    assert json_text.dumps(value, indented) == expected
    assert json_text.loads(expected) == value


@pytest.mark.parametrize("text", [b"", b"[", b"NaN", b"[1,]", b'"\\ud800"', b'"\xff"', b"\xef\xbb\xbf[]", b"[" * 9**6])
def test_refused_by_both(without, text):
    for _ in range(2):
        with pytest.raises(ValueError):
            json_text.loads(text)
        without()
    for value in ("\ud800", {"a": ["\udfff"]}):
        with pytest.raises(ValueError):
            json_text.dumps(value)


@pytest.mark.parametrize("content", RECORDS + BROKEN)
def test_the_same_records_up_to_the_same_mistake(without, tmp_path, content):
    pytest.importorskip("ijson")
    path = tmp_path / "x.json"
    path.write_bytes(content)
    expected = read(path)
    assert expected[1] == (content in RECORDS)
    without()
    assert read(path) == expected


def test_the_same_at_every_place_where_a_file_may_be_cut_or_damaged(without, tmp_path):
    pytest.importorskip("ijson")
    pair = {"question": "é \" \\ 1", "answer": "x", "n": [1, {"a": 2.5e3}], "t": True}
    whole = json.dumps([pair] * 3, indent=1).encode()
    draw = random.Random(0)
    contents = [whole[:i] for i in range(len(whole))]
    contents += [whole[:i] + bytes([draw.choice(b'"\\{}[],: \n\x00\xff\xc3t1-')]) + whole[i + 1:]
                 for i in range(len(whole))]
    expected, path = [], tmp_path / "x.json"
    for hide in (lambda: None, without):
        hide()
        found = []
        for content in contents:
            path.write_bytes(content)
            found.append(read(path))
        expected.append(found)
    different = [(content, *results) for content, *results in zip(contents, *expected) if results[0] != results[1]]
    assert different == []
