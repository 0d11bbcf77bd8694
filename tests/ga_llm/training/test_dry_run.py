"""--dry_run through stage 2's script: what it finds in the data, what it leaves alone, what it prints."""
import json
import re
import sys

import pytest

import finetune_LLM_with_GCIM
from ga_llm.base.cli import UserError
from ga_llm.llm import plan
from ga_llm.training import arguments, dry_run


def pair(history, target):
    check_ins = " ".join(f"2012-04-03 18:00:09 user 1 POI id {i} <GPS {i}>." for i in history)
    return {"question": f"<question>: {check_ins} Where next? POI ids range from 1 to 13.",
            "answer": f"<answer>: user 1 will visit POI id {target}."}


# The last three are too long. Of these the first names its target, 2, at the beginning alone; the second names 3 at the
# end, too; the third never names 9.
PAIRS = [pair([1], 2), pair([3, 2], 2), pair([2] + 20 * [1], 2), pair([3] + 19 * [1] + [3], 3), pair(21 * [1], 9)]


@pytest.fixture
def inputs(tmp_path, mapping_csv, tiny_llama, monkeypatch):
    """flags(**others): a command line of stage 2 over PAIRS."""
    def flags(**others):
        data = tmp_path / "pairs.json"
        data.write_text(json.dumps(PAIRS))
        options = {"model_name_or_path": tiny_llama(), "data_path": data, "gps_mapping_path": mapping_csv,
                   "output_dir": tmp_path / "out", "model_max_length": 250, "load_in_4bit": False,
                   "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2,
                   "per_device_train_batch_size": 2, **others}
        return [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return flags


def stage_2(monkeypatch, capsys, argv) -> str:
    monkeypatch.setattr(sys, "argv", ["finetune_LLM_with_GCIM.py", *argv])
    finetune_LLM_with_GCIM.main()
    return capsys.readouterr().out


def test_plan_of_a_run(inputs, tmp_path, monkeypatch, capsys):
    weights = []
    monkeypatch.setattr(dry_run._Stopwatch, "on_optimizer_step", lambda self, args, state, control, model, **kwargs:
                        weights.append(model.get_input_embeddings().weight.detach().clone()))
    out = stage_2(monkeypatch, capsys, [*inputs(num_train_epochs=3), "--dry_run"])
    assert len(weights) == 3 and not weights[0].equal(weights[2])      # real steps
    assert not (tmp_path / "out").exists()
    assert "truncated  3 pairs (60.0%)" in out
    assert "2 of them name the target's place before they ask; 1 of these lose it" in out
    assert "places     3 of the mapping's 12 occur" in out
    assert re.search(r"trained    LLM embeddings [\d,]+, LLM LoRA [\d,]+, LLM norms 160\n", out)    # 5 norms of 32
    assert "longest length, 250 tokens" in out
    assert "2 optimizer steps on 1 process(es)" in out and "all 3 epochs" in out    # 3 micro-batches, two to a step
    assert re.search(r"weights, trained +\d", out) and re.search(r"total( +\d+\.\d\d){4}\n", out)


def test_output_dir_stays_as_it_is(inputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_log.jsonl").write_text("mine")
    out = stage_2(monkeypatch, capsys, inputs(dry_run=True, max_steps=4))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trainer_log.jsonl"]
    assert (tmp_path / "out" / "trainer_log.jsonl").read_text() == "mine"
    assert "all 2 epochs" in out                      # --max_steps 4


def test_plan_of_trees(inputs, tmp_path, monkeypatch, capsys):
    """Trees have no padding, and fewer tokens than their pairs; full attention."""
    argv = inputs(shared_prefix=True, use_full_attn=True, model_max_length=2048, dry_run=True)
    (tmp_path / "pairs.json").write_text(json.dumps([pair(list(range(1, 4)) * n, 5) for n in (2, 3, 4)]))
    out = stage_2(monkeypatch, capsys, argv)
    assert "and 0.0% padding" in out and "full attention" in out and "truncated  0 pairs" in out
    pairs, trees = (int(re.search(pattern, out)[1].replace(",", ""))
                    for pattern in (r"tokens ([\d,]+) in all", r"epoch +([\d,]+) tokens"))
    assert trees < pairs


def test_a_run_that_would_be_refused(inputs, tmp_path):
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match="holds checkpoint-1 of an earlier run"):
        arguments.parse(arguments.SFTArguments, inputs(dry_run=True))


@pytest.mark.parametrize("prompt, answer, named", [
    ("POI id 12 <GPS 12>. Which? POI ids range from 0 to 40.", "will visit POI id 12.", True),
    ("POI id 121. Which? POI ids range from 12 to 40.", "will visit POI id 12.", False),
    ("<GPS 12>. Which?", "will visit POI id 12.", True),
    ("POI id 3 <GPS 3>. What are the coordinates of <GPS 12>?", "Latitude 1.0", False),
    ("POI id 12 <GPS 12>. What are the coordinates of <GPS 12>?", "Latitude 1.0", True),
    ("Nowhere.", "Latitude 1.0", False),
])
def test_whether_a_prompt_names_its_target(prompt, answer, named):
    assert dry_run.names_target(prompt, answer) is named


def test_time_of_an_epoch_by_hand():
    """Steps of 10 and 30 FLOPs took 1 and 2 s, half a second the optimizer; four micro-batches on two processes."""
    args = type("Arguments", (), {"world_size": 2, "planned_accumulation_steps": 1, "num_train_epochs": 60})
    epoch = dry_run.Work(*map(dry_run.np.array, ([10.0, 30.0, 50.0, 10.0], [1.0, 3.0, 5.0, 1.0], [5, 5, 5, 5])))
    steps = [dry_run.Step(5, None, flops=10.0, passes=1.0, optimizer=0.5),
             dry_run.Step(9, None, flops=30.0, passes=2.0, optimizer=0.5)]
    text = "\n".join(dry_run.describe_epoch(args, epoch, 15, steps, -1))
    assert "15 tokens, and 25.0% padding" in text and "100 FLOPs, of which 10%" in text
    assert "2 optimizer steps on 2 process(es): 0:00:04; all 60 epochs: 0:04:30" in text   # (1 + 2 + 3 + 1) / 2 + 2 / 2


def test_llama_2_7b_as_printed():
    model = plan.Model(4096, 32, 32, 32, 11008, 36_980, 128)
    run = plan.Run(32768, 1, 40, 151_736_320, 8_388_608, 40_796_160, 8, True, four_bit=True, bf16=True, zero_stage=2)
    lines = dry_run.describe_memory(model, run)
    assert "6,779.21 M parameters in NF4, batch 1 of 32,768 tokens, S²-Attn, ZeRO-2" in lines[0]
    assert lines[-1].split() == ["total", "24.06", "23.02", "22.50", "22.24"]
    # By hand: 24.065 GiB, see test_plan; N = 2 saves half of 2,241,748,992 bytes of gradients and optimizer, 1.044 GiB.
