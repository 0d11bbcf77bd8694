"""Options of transformers that want a package, a companion or another machine: one line, before a step is made."""
import pytest
import torch

from ga_llm.base.cli import UserError
from ga_llm.training import arguments, building


@pytest.fixture
def parse(tmp_path):
    def run(*extra):
        (tmp_path / "x").write_text("x")
        return arguments.parse(arguments.SFTArguments, [
            "--model_name_or_path", "M", "--output_dir", str(tmp_path / "O"), "--data_path", str(tmp_path / "x"),
            "--gps_mapping_path", str(tmp_path / "x"), *extra])
    return run


PARSED = [
    ("--save_strategy best", "--save_strategy best: .*give --save_strategy steps"),
    ("--eval_on_start True", "--eval_on_start True: .*leave it out"),
    ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr: One of min_lr or min_lr_rate"),
    ("--lr_scheduler_type warmup_stable_decay", "num_decay_steps"),
    ("--lr_scheduler_type reduce_lr_on_plateau", "eval strategy"),
    ("--lr_scheduler_type greedy", "greedy"),
    ("--lr_scheduler_kwargs nonsense", "--lr_scheduler_kwargs nonsense: "),
    ('--lr_scheduler_kwargs {"a":1}', "unexpected keyword argument 'a'"),
    ("--lr_scheduler_kwargs {broken", "--lr_scheduler_kwargs {broken: "),
    ("--optim galore_adamw", "--optim galore_adamw: You need to install"),
    ("--optim adamw_torch_4bit", "--optim adamw_torch_4bit: "), ("--optim apollo_adamw", "--optim apollo_adamw: "),
    ("--optim lomo", "--optim lomo: "), ("--optim schedule_free_adamw", "--optim schedule_free_adamw: "),
    ("--accelerator_config nowhere.json", "--accelerator_config nowhere.json: .*No such file"),
    ('--accelerator_config {"a":1}', "--accelerator_config .*unexpected keyword"),
    ("--load_best_model_at_end True", "save and eval strategy"),
    ("--dataloader_prefetch_factor 2", "dataloader_num_workers"),
    ("--torch_empty_cache_steps 0", "torch_empty_cache_steps"),
    ("--adam_beta1 -1", "--adam_beta1 -1.0: must be at least 0"),
    ("--ddp_timeout -1", "--ddp_timeout -1: must be more than 0"),
]


@pytest.mark.parametrize("flags, message", PARSED)
def test_while_flags_are_parsed(parse, tmp_path, flags, message):
    with pytest.raises(UserError, match=message.replace("{", r"\{")) as error:
        parse(*flags.split())
    assert "\n" not in str(error.value) and ";" in str(error.value) and not (tmp_path / "O").exists()


BUILT = [
    ({"optim_args": "a"}, "--optim adamw_torch_fused --optim_args a: "),
    ({"optim": "grokadamw"}, "--optim grokadamw: "), ({"optim": "adamw_torch_xla"}, "--optim adamw_torch_xla: "),
    ({"dataloader_persistent_workers": True}, "--dataloader_….*num_workers > 0"),
    ({"dataloader_multiprocessing_context": "fork"}, "--dataloader_….*num_workers > 0"),
    ({"torch_compile_backend": "nonsense"}, "--torch_compile .*nonsense"),
    ({"torch_compile_mode": "nonsense"}, "--torch_compile .*nonsense"),
]


@pytest.mark.parametrize("flags, message", BUILT)
def test_while_the_trainer_is_built(train, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as error:
        train(2, **flags)
    assert "\n" not in str(error.value) and ";" in str(error.value)
    assert not list((tmp_path / "stage2").glob("checkpoint-*"))


def test_whatever_a_package_raises(train, monkeypatch):
    """Our own refusals and a lack of memory stay what they are."""
    for raised, expected in ((AssertionError("two\nlines."), UserError), (KeyError("x"), UserError),
                             (MemoryError(), MemoryError), (KeyboardInterrupt(), KeyboardInterrupt)):
        def fail(*args, raised=raised, **kwargs):
            raise raised

        monkeypatch.setattr(building.Trainer, "create_optimizer", fail)
        with pytest.raises(expected) as error:
            train(2)
        if expected is UserError:
            assert str(error.value).startswith("--optim adamw_torch_fused: ") and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about training on a CPU")
@pytest.mark.parametrize("flag", [["--use_liger_kernel"], ["--use-liger-kernel", "True"], ["--tf32"]])
def test_a_gpus_flags_without_a_value_or_with_dashes(parse, flag):
    args = parse(*flag)
    assert not args.use_liger_kernel and not args.tf32
