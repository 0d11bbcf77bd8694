"""The README's flags: old names, booleans, what the machine lacks, what is unknown."""
import logging
import os

import pytest
import torch

from ga_llm.base.cli import UserError, boolean
from ga_llm.training import arguments

README = """--model_name_or_path M --bf16 True --output_dir O --gps_mapping_path G.csv --model_max_length 32768
--use_flash_attn True --data_path D.json --low_rank_training True --num_train_epochs 3 --per_device_train_batch_size 1
--per_device_eval_batch_size 2 --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps
--save_steps 1000 --save_total_limit 2 --learning_rate 2e-5 --weight_decay 0.0 --warmup_steps 20
--lr_scheduler_type constant_with_warmup --logging_steps 1 --tf32 True""".split()


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("D.json", "G.csv"):
        (tmp_path / name).write_text("x")
    return tmp_path


def parse(*extra):
    return arguments.parse(arguments.SFTArguments, [*README, *extra])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU lacks")
def test_readme_flags_on_a_cpu(inputs, caplog):
    caplog.set_level(logging.INFO)
    args = parse("--warmup_ratio", "0.1", "--overwrite_output_dir", "True", "--group_by_length", "True")
    assert args.eval_strategy == "no" and args.save_steps == 1000 and args.use_cpu and not args.tf32
    assert args.low_rank_training is True and args.learning_rate == 2e-5 and args.model_max_length == 32768
    assert args.warmup_steps == 0.1 and args.train_sampling_strategy == "group_by_length"
    for line in ("--evaluation_strategy is --eval_strategy", "no GPU: training on the CPU", "--tf32 is for GPUs",
                 "--overwrite_output_dir no longer exists", "--warmup_ratio is --warmup_steps"):
        assert line in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="about training on a CPU")
def test_threads_under_torchrun(monkeypatch):
    """As many as torch takes by itself, said so that accelerate does not warn; a number that is given stays."""
    monkeypatch.setenv("RANK", "0")
    for given, expected in (("3", "3"), (None, str(torch.get_num_threads()))):
        monkeypatch.setenv("OMP_NUM_THREADS", given or "")
        if given is None:
            monkeypatch.delenv("OMP_NUM_THREADS")
        arguments._fit_to_machine([])
        assert os.environ["OMP_NUM_THREADS"] == expected


@pytest.mark.parametrize("text, value", [("True", True), ("False", False), ("false", False), ("0", False),
                                         ("yes", True)])
def test_booleans(inputs, text, value):
    assert boolean(text) is value
    assert parse("--low_rank_training", text).low_rank_training is value
    assert parse("--use_full_attn", text).use_full_attn is value


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_reaches_trainer_under_either_name(inputs, name):
    """transformers 5.17 reads the old name alone, and would keep every activation without a word."""
    assert getattr(parse(), name) is True and getattr(parse(), f"{name}_kwargs") == {"use_reentrant": False}
    assert getattr(parse("--activation_checkpointing", "False"), name) is False
    assert getattr(parse("--gradient_checkpointing", "False"), name) is False


@pytest.mark.parametrize("extra, message", [
    (["--lerning_rate", "1"], "did you mean --learning_rate"),
    (["-learning_rate", "1"], "'-learning_rate': flags start with --"),
    (["--data_path", "missing.json"], "missing.json: not found"),
    (["--gps_mapping_path", ""], "--gps_mapping_path is required"),
    (["--model_max_length", "3"], "too short"),
    (["--use_full_attn", "maybe"], "use_full_attn"),
    (["--deepspeed", "ds_configs/stage2.json"], "torchrun"),
    (["--save_strategy", "sometimes"], "sometimes"),
    (["--shared_prefix", "True"], "add --use_full_attn True"),
    (["--shared_prefix", "True", "--use_full_attn", "True", "--tree_tokens", "99"], "--tree_tokens 99"),
    (["--tree_tokens", "65536"], "goes with --shared_prefix True"),
])
def test_mistakes_are_one_line(inputs, monkeypatch, extra, message):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=message) as error:
        parse(*extra)
    assert "\n" not in str(error.value)


def test_deepspeed_is_replaced_where_it_is_missing(inputs, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(arguments, "_deepspeed_lacks", lambda: "deepspeed is not installed")
    (inputs / "ds_configs").mkdir()
    (inputs / "ds_configs/stage2.json").write_text("{}")
    assert parse("--deepspeed", "ds_configs/stage2.json").deepspeed is None
    assert "--deepspeed ignored, plain data parallelism instead: deepspeed is not installed" in caplog.text


def test_compiling_is_ours(inputs):
    """transformers would compile the model as a whole, S²-Attn and checkpointing with it."""
    args = parse("--torch_compile", "True", "--torch_compile_mode", "default")
    assert args.compiles_layers and args.compile_options == {"mode": "default"} and not args.torch_compile
    assert not parse().compiles_layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="about training on a CPU")
def test_liger_is_for_gpus(inputs, caplog):
    caplog.set_level(logging.INFO)
    args = parse("--use_liger_kernel", "True")
    assert not args.use_liger_kernel and "--use_liger_kernel is for GPUs: ignored" in caplog.text
