"""Texts as vectors: those of plain forwards, text by text; kept, resumed, and made again when anything changes."""
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ga_llm.base.cli import UserError
from ga_llm.llm.text_vectors import TextEncoder
from ga_llm.pairs import sft_data

TEXTS = [" ".join(f"At {n % 7}:00 POI id {n * k % 13}." for k in range(1 + n * 5 % 11)) for n in range(13)]


def encoder(tiny_llama, folder, batch_size=4, max_tokens=1024, style="llama3", dtype=None) -> TextEncoder:
    return TextEncoder(tiny_llama(style), max_tokens, batch_size, dtype, folder)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("style", ["llama3", "sentencepiece"])
@pytest.mark.parametrize("max_tokens", [1024, 40])
def test_as_a_plain_forward_gives(tiny_llama, tmp_path, style, max_tokens):
    found = encoder(tiny_llama, tmp_path, max_tokens=max_tokens, style=style)(TEXTS)
    folder, cut = tiny_llama(style), 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    expected = []
    for text in TEXTS:
        whole = tokenizer(text)["input_ids"]
        ids = sft_data.truncate(whole, max_tokens, tokenizer.bos_token_id)
        assert ids[1:] == whole[len(whole) - len(ids) + 1:]     # the end, behind BOS
        cut += len(ids) < len(whole)
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        expected.append(states[0].mean(0).numpy())
    assert (cut > 3) == (max_tokens == 40) and len(found) == len(TEXTS)
    np.testing.assert_allclose(found[np.arange(len(TEXTS))], expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found[np.array([7, 2, 7])], found[np.arange(len(TEXTS))][[7, 2, 7]])


class Stopped(Exception):
    pass


def stop_after(monkeypatch, batches: int) -> list[int]:
    """Let the encoding fail behind so many batches; returns the list of how many texts each call got."""
    encode, calls = TextEncoder._encode, []

    def counted(self, texts):
        if len(calls) == batches:
            raise Stopped
        calls.append(len(texts))
        return encode(self, texts)
    monkeypatch.setattr(TextEncoder, "_encode", counted)
    return calls


@pytest.mark.parametrize("batches, torn", [(0, 0), (1, 0), (2, 7), (3, -5), (2, -128), (1, -300)])
def test_goes_on_where_it_stopped(tiny_llama, tmp_path, monkeypatch, batches, torn):
    """And ends with the same bytes, also where the last row written is torn, or only a part of a batch is there."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    encoder(tiny_llama, whole)(TEXTS)
    stop_after(monkeypatch, batches)
    with pytest.raises(Stopped):
        encoder(tiny_llama, cut)(TEXTS)
    partial, = cut.iterdir()
    assert partial.name.startswith(".") and partial.name.endswith(".partial")
    content = partial.read_bytes()
    partial.write_bytes(content + b"x" * torn if torn >= 0 else content[:torn])
    monkeypatch.undo()
    calls = stop_after(monkeypatch, 99)
    encoder(tiny_llama, cut)(TEXTS)
    assert sum(calls) == len(TEXTS) - 4 * max(0, batches - (torn < 0))
    assert files(cut) == files(whole) and len(files(whole)) == 1


def test_made_once_whatever_the_order(tiny_llama, tmp_path, monkeypatch):
    encode = encoder(tiny_llama, tmp_path)
    first, before = encode(TEXTS), files(tmp_path)
    calls = stop_after(monkeypatch, 0)
    again = encoder(tiny_llama, tmp_path)
    assert (again(TEXTS[::-1])[np.arange(13)[::-1]] == first[np.arange(13)]).all() and calls == []
    assert "model" not in vars(again) and files(tmp_path) == before     # the LLM was not even loaded


def test_whatever_changes_another_file_is_made(tiny_llama, tmp_path):
    for encode, texts in ((encoder(tiny_llama, tmp_path), TEXTS), (encoder(tiny_llama, tmp_path), TEXTS[1:]),
                          (encoder(tiny_llama, tmp_path, batch_size=5), TEXTS),
                          (encoder(tiny_llama, tmp_path, max_tokens=50), TEXTS),
                          (encoder(tiny_llama, tmp_path, style="sentencepiece"), TEXTS),
                          (encoder(tiny_llama, tmp_path, dtype="bfloat16"), TEXTS),
                          (TextEncoder(tiny_llama(seed=1), 1024, 4, None, tmp_path), TEXTS)):
        before = len(files(tmp_path))
        encode(texts)
        assert len(files(tmp_path)) == before + 1


@pytest.mark.parametrize("damage", [lambda content: content[:-4], lambda content: content[:50], lambda content: b"",
                                    lambda content: content.replace(b"<f4", b"<f2"), lambda content: b"x" * 4000,
                                    lambda content: content.replace(b"(13, ", b"(12, ")])
def test_a_damaged_file_is_one_line(tiny_llama, tmp_path, damage):
    encoder(tiny_llama, tmp_path)(TEXTS)
    path, = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="damaged .*; delete it"):
        encoder(tiny_llama, tmp_path)(TEXTS)


def test_not_a_number_is_one_line(tiny_llama, tmp_path):
    encode = encoder(tiny_llama, tmp_path)
    with torch.no_grad():
        encode.model.norm.weight[3] = float("inf")
    with pytest.raises(UserError, match="NaN or infinity"):
        encode(TEXTS)
    assert [path.name[0] for path in tmp_path.iterdir()] in ([], ["."])
