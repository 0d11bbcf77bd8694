"""benchmarks/gpu.py, all parts at toy sizes on the CPU; what a part that fails or runs out of time leaves."""
import json
import sys
import types

import forked
import pytest
from commands import ROOT
from harness import call

sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from card.chain import Chain  # noqa: E402
from card.record import Record  # noqa: E402

from ga_llm.base.cli import UserError  # noqa: E402


@pytest.mark.parametrize("parts", ["numerics,llama7b,ranking", *(pytest.param(part, marks=pytest.mark.slow)
                                                                 for part in ("real", "processes"))])
def test_all_parts_at_toy_sizes(tmp_path, parts, monkeypatch):
    if "numerics" in parts:     # its trainings are started in the other parts
        monkeypatch.setattr(Chain, "start", lambda chain, script, *flags: chain.check(
            script, forked.run(chain.folder, [script, *flags], chain.log(script)).code))
    result = call(ROOT, "benchmarks/gpu.py", "--device", "cpu", "--toy", "--parts", parts, "--minutes", "20",
                  "--output_dir", tmp_path)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    found = {row["what"]: row for row in rows}
    assert not any(row["met"] is False or row["what"] in ("failed", "left out") for row in rows), result.out
    assert result.code == 0, result.err
    if "numerics" in parts:
        assert sum(bool(row["limit"]) for row in rows) >= 20
        assert found["resumed run: furthest weight from the whole run's (0: bitwise)"]["value"] == 0
        assert found["256 tokens, S²-Attn: against a plain step"]["value"] > 0
        assert found["three epochs of sample, 246 pairs, S²-Attn"]["value"] > 0
        assert found["exact ranking against 20 beams"]["value"] > 0
    elif parts == "real":
        assert found["test pairs"]["value"] == 32
        assert any(what.startswith("user-history frequency: Acc@1") for what in found)
    else:
        assert found["DDP, two processes: furthest loss from one process's"]["met"]


def test_a_part_that_fails_is_a_row_and_the_next_begins(tmp_path, capsys):
    record = Record(tmp_path, 1, "cpu")

    def breaks(record, args):
        record.add("one", "share", 0.4, least=0.5)
        raise RuntimeError("no\nkernel")

    def lacks(record, args):
        raise UserError("model: not found")

    record.attempt("one", breaks, types.SimpleNamespace())
    record.attempt("two", lacks, types.SimpleNamespace())
    assert record.failed
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["what"], row["value"], row["met"]) for row in rows if row["unit"] != "s"] == [
        ("share", 0.4, False), ("failed", "RuntimeError: no kernel", False), ("left out", "model: not found", None)]
    assert "RuntimeError" in (tmp_path / "one.traceback.txt").read_text()
    assert "MISSED" in capsys.readouterr().out


def test_no_part_begins_when_the_minutes_are_over(tmp_path):
    record = Record(tmp_path, 0, "cpu")
    record.attempt("one", lambda *_: pytest.fail("begun"), types.SimpleNamespace())
    assert [row.value for row in record.rows] == ["no minutes left; give more with --minutes"]
    record.add("one", "nothing", None, most=1)
    assert record.failed        # what was not found does not keep its limit


@pytest.mark.parametrize("flags, message", [
    (["--parts", "llama70b"], "--parts llama70b: unknown"), (["--device", "cpu"], "goes with --toy"),
    (["--toy", "--device", "cpu", "--variants", "fast"], "--variants fast: unknown")])
def test_refused(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    with pytest.raises(UserError, match=message):
        gpu.arguments()
