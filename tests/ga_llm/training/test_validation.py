"""Validation while training: the loss by hand, what it leaves alone, the best checkpoint, when to stop."""
import argparse
import json
import logging

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.llm import backbone
from ga_llm.pairs import sft_data
from ga_llm.training import additions, arguments, common, ranked, resuming, run_log, staging, trainers, validation

STEPS = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
BEST = {**STEPS, "load_best_model_at_end": True}


# The loss.

@pytest.fixture
def trained(asked_city, tiny_llama, tmp_path):
    """trained(kind, **flags): a trainer of stage 2 without an encoder that has made two steps and evaluated."""
    def run(kind="text", **flags):
        flags = {"pointer": False, "geo_output": False, "geo_encoder": "", **flags}
        folder = asked_city / kind
        options = {"model_name_or_path": tiny_llama(), "gps_mapping_path": folder / artifacts.gps_mapping("sample"),
                   "data_path": folder / artifacts.questions("train", "sample", 2, False), "bf16": False,
                   "output_dir": tmp_path / "out", "model_max_length": 1024, "load_in_4bit": False, "max_steps": 2,
                   "learning_rate": 0.01, "per_device_train_batch_size": 2, "eval_strategy": "steps",
                   "logging_steps": 1, **flags}
        beyond = {name: options.pop(name) for name in ("pointer", "geo_output", "geo_encoder")}
        args = arguments.parse(arguments.SFTArguments, [p for k, v in options.items() for p in (f"--{k}", str(v))])
        vars(args).update(beyond, pointer_heads=8, pointer_without="", dropout=0.1)
        setup = common.set_up(args)
        model = backbone.add_lora(setup.model, 8, 16, 0.1)
        backbone.train_by_name(model, "embed,norm")
        additions.attach(args, setup)
        trainer = trainers.GATrainer(model=model, args=args, train_dataset=setup.train_dataset,
                                     eval_dataset=setup.eval_dataset, data_collator=setup.collator,
                                     processing_class=setup.tokenizer)
        resuming.train(trainer)
        return trainer, setup
    return run


def one_by_one(trainer, setup, args):
    """The mean over the labels of all validation pairs, each by itself through the model as it is."""
    places = len(setup.mapping.ids) if args.pointer else None
    plain = argparse.Namespace(shared_prefix=False, batch_tokens=0)
    collator = common.make_collator(plain, setup.tokenizer, places)
    pairs, _ = common.read_pairs(args, args.eval_data_path, setup.tokenizer, setup.mapping, setup.token_ids, True)
    model, total, count = trainer.model.eval(), 0.0, 0
    for pair in (pairs[i] for i in sft_data.drawn(len(pairs), args.eval_limit)):
        batch = collator([pair])
        labels = batch["shift_labels"]
        assert args.loss_on == "answer" or pair["answer_start"] <= pair["targets"].argmax()
        with torch.no_grad():
            if args.pointer:
                total += model(**batch, num_items_in_batch=1).loss.item()
            else:
                logits = model(batch["input_ids"], use_cache=False).logits[0, -labels.shape[1]:].double()
                kept = labels[0] != sft_data.IGNORED
                total -= logits.log_softmax(-1)[kept].gather(1, labels[0][kept, None]).sum().item()
        count += int((labels != sft_data.IGNORED).sum())
    return total / count, count


KINDS = {
    "padded": {"per_device_eval_batch_size": 3},
    "smoothed": {"label_smoothing_factor": 0.2, "per_device_eval_batch_size": 1},
    "trees": {"shared_prefix": True, "use_full_attn": True},
    "batches": {"batch_tokens": 700, "eval_limit": 5},
    "ids": {"loss_on": "poi_ids", "per_device_eval_batch_size": 4, "eval_limit": 7},
    "ids in trees": {"loss_on": "poi_ids", "shared_prefix": True, "use_full_attn": True},
    "pointer": {"kind": "moments", "pointer": True},
    "pointer, ids, trees": {"kind": "tokens", "pointer": True, "loss_on": "poi_ids", "shared_prefix": True,
                            "use_full_attn": True},
}


@pytest.mark.bulk
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_pairs_one_by_one(trained, kind):
    trainer, setup = trained(**KINDS[kind])
    line = trainer.state.log_history[-2]        # transformers' last is about the run
    loss, tokens = one_by_one(trainer, setup, trainer.args)
    assert line["step"] == 2 and line["eval_tokens"] == tokens
    assert line["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_processes_share_the_batches_out_and_make_as_many_passes():
    lengths, seen = torch.arange(1, 12).numpy(), []
    for rank in range(4):
        args = argparse.Namespace(per_device_eval_batch_size=2, world_size=4, process_index=rank)
        made = list(validation.shares(lengths, args))
        assert len(made) == 2 and made[0][1]
        seen += [item for items, counts in made if counts for item in items]
    assert sorted(seen) == list(range(11))


def test_the_same_pairs_are_drawn_each_time():
    assert sft_data.drawn(5, 0) == sft_data.drawn(5, 5) == sft_data.drawn(5, 9) == [0, 1, 2, 3, 4]
    some = sft_data.drawn(1000, 20)
    assert some == sorted(set(some)) == sft_data.drawn(1000, 20) and len(some) == 20 and some[-1] > 500


# What a run leaves.

def weights(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stage", [1, 2])
def test_it_changes_nothing_that_is_trained(train, tmp_path, stage):
    """LoRA's and the encoder's dropout draw the same numbers with evaluations between the steps, and without."""
    train(stage, output_dir=tmp_path / "with", **{**STEPS, "eval_steps": 1})
    train(stage, output_dir=tmp_path / "without")
    assert same(weights(tmp_path / "with/checkpoint-4"), weights(tmp_path / "without/checkpoint-4"))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_resumed_run_is_the_whole_one(train, tmp_path, interrupted, strategy):
    """Killed behind its first checkpoint, which lies at the end of an epoch."""
    flags = {"eval_strategy": strategy, "logging_steps": 1, "max_steps": 8, "save_steps": 4,
             "per_device_train_batch_size": 1}
    whole = train(2, output_dir=tmp_path / "whole", **flags)
    with pytest.raises(interrupted):
        train(2, output_dir=tmp_path / "other", interrupt_at=5, **flags)
    train(2, output_dir=tmp_path / "other", resume_from_checkpoint="auto", **flags)
    assert same(weights(tmp_path / "whole/checkpoint-8"), weights(tmp_path / "other/checkpoint-8"))
    logs = [[(line["step"], line.get("loss"), line.get("eval_loss")) for line in run_log.read_log(tmp_path / name)]
            for name in (f"whole/{artifacts.TRAINER_LOG}", f"other/{artifacts.TRAINER_LOG}")]
    assert logs[0] == logs[1] and [step for step, _, loss in logs[0] if loss is not None] == [4, 8]
    assert len(validation.evaluations(whole.state.log_history)) == 2


def told(monkeypatch, losses):
    """Let the evaluation of each step find these losses."""
    def evaluate(self, *args, **kwargs):
        found = {"eval_loss": losses[self.state.global_step], "eval_tokens": 9}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    monkeypatch.setattr(validation.ValidatedTrainer, "evaluate", evaluate)


def best_of(folder):
    return json.loads((folder / artifacts.RUN).read_text())["best"]


@pytest.mark.parametrize("limit, left", [(1, [4, 8]), (2, [4, 6, 8]), (5, [2, 4, 6, 8])])
def test_the_best_checkpoint_stays_and_is_named(train, tmp_path, monkeypatch, caplog, limit, left):
    caplog.set_level(logging.INFO)
    told(monkeypatch, {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0})
    trainer = train(2, max_steps=8, save_total_limit=limit, **BEST)
    assert staging.steps(tmp_path / "stage2") == left and trainer.result_step == 4
    assert best_of(tmp_path / "stage2") == {"checkpoint": "checkpoint-4", "step": 4, "eval_loss": 1.0}
    assert f"best validation loss of the checkpoints: 1.0000, {tmp_path / 'stage2/checkpoint-4'}" in caplog.messages


def test_the_final_encoder_is_the_best_ones(train, tmp_path, monkeypatch):
    """Also where nothing is left to train; without the flag it is the last one's."""
    told(monkeypatch, {2: 1.0, 4: 2.0})
    trainer, folder = train(1, **BEST), tmp_path / "stage1"
    final, best, last = (folder / name for name in (artifacts.FINAL_ENCODER, f"2/{artifacts.MERGED_ENCODER}",
                                                    f"4/{artifacts.MERGED_ENCODER}"))
    assert trainer.result_step == 2 and final.read_bytes() == best.read_bytes() != last.read_bytes()
    final.unlink()
    train(1, **BEST, resume_from_checkpoint="auto")
    assert final.read_bytes() == best.read_bytes()
    train(1, **STEPS, resume_from_checkpoint="auto")
    assert final.read_bytes() == last.read_bytes() and best.exists()


@pytest.mark.parametrize("saves", [{"save_steps": 3}, {"save_strategy": "epoch"}, {"save_strategy": "no"}])
def test_it_stops_early_with_a_checkpoint(train, tmp_path, monkeypatch, saves):
    """Lowest at step 2; the second evaluation in a row that is no better is that of step 6. Started again, it is at
    its end; with more patience it goes on."""
    told(monkeypatch, {2: 1.0, 4: 1.5, 6: 1.0, 8: 1.2, 10: 1.1})
    flags = {**STEPS, "max_steps": 10, "lr_scheduler_type": "constant", **saves}
    trainer = train(2, early_stopping_patience=2, **flags)
    assert trainer.state.global_step == 6 and staging.steps(tmp_path / "stage2")[-1] == 6
    before = (tmp_path / "stage2" / artifacts.TRAINER_LOG).read_bytes()
    assert train(2, early_stopping_patience=2, resume_from_checkpoint="auto", **flags).state.global_step == 6
    assert (tmp_path / "stage2" / artifacts.TRAINER_LOG).read_bytes() == before
    assert train(2, early_stopping_patience=4, resume_from_checkpoint="auto", **flags).state.global_step == 10


def test_patience_counts_behind_an_interruption(train, tmp_path, monkeypatch, interrupted):
    told(monkeypatch, {1: 1.0, 2: 1.5, 3: 1.6, 4: 0.1})
    flags = {**STEPS, "eval_steps": 1, "early_stopping_patience": 2}
    with pytest.raises(interrupted):
        train(2, interrupt_at=2, **flags)
    assert train(2, resume_from_checkpoint="auto", **flags).state.global_step == 3


def test_other_questions_are_not_compared():
    history = [{"step": n, "eval_loss": loss, "eval_tokens": tokens}
               for n, loss, tokens in ((1, 0.1, 50), (2, 3.0, 90), (3, 2.0, 90), (4, 2.5, 90))]
    assert validation.best(history, {1, 2, 3, 4})["step"] == 3 and validation.best(history, {2, 4})["step"] == 4
    assert validation.best(history, {1}) is None and validation.best([{"step": 1, "loss": 2.0}, "x"], {1}) is None
    assert [validation.stopped(history, patience) for patience in (None, 1, 2)] == [False, True, False]
    assert not validation.stopped([], 1)


def test_a_loss_that_is_not_finite_ends_the_run(train, tmp_path, monkeypatch):
    shares = validation.shares

    def poisoned(lengths, args):
        for items, counts in shares(lengths, args):
            yield items, float("nan")

    monkeypatch.setattr(validation, "shares", poisoned)
    with pytest.raises(UserError, match="step 2: validation loss not finite"):
        train(2, **STEPS)
    assert not staging.steps(tmp_path / "stage2")


# The log.

def test_log_picture_and_tensorboard(train, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer, folder = train(2, report_to="tensorboard", **STEPS), tmp_path / "stage2"
    lines = run_log.read_log(folder / artifacts.TRAINER_LOG)
    assert [(line["step"], "loss" in line, "eval_loss" in line) for line in lines] == [
        (1, True, False), (2, True, False), (2, False, True), (3, True, False), (4, True, False), (4, False, True)]
    assert all(line["eval_tokens"] > 0 and line["eval_runtime"] >= 0 for line in lines if "eval_loss" in line)
    scalars = events.EventAccumulator(str(next((folder / "runs").iterdir()))).Reload()
    found = [(event.step, event.value) for event in scalars.Scalars("eval/loss")]
    expected = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert found == [(step, pytest.approx(loss)) for step, loss in expected]

    axes = Figure().subplots()
    ranking = {"step": 4, "eval_Acc@1": 0.25, "eval_MRR": 0.5, "eval_ranked": 8, "eval_ranked_step": 2}
    run_log.plot_loss(axes, [*lines, ranking])
    curves = [list(zip(*line.get_data())) for line in axes.get_lines()]
    assert [step for step, _ in curves[0]] == [1, 2, 3, 4] and curves[2] == expected
    assert axes.get_title() == "step 2, 8 validation questions: Acc@1 0.2500, MRR 0.5000"
    assert (folder / artifacts.LOSS_PICTURE).exists() and trainer.result_step == 4


def test_tokens_per_second_are_the_trainings_own(train, tmp_path, monkeypatch):
    """A second a step, a thousand an evaluation; each step has all pairs."""
    clock = argparse.Namespace(now=100.0)
    clock.perf_counter = clock.time = lambda: clock.now
    step, shares = run_log.Trainer.training_step, validation.shares

    def training_step(self, *args, **kwargs):
        clock.now += 1
        return step(self, *args, **kwargs)

    def slowly(*args):
        clock.now += 1000
        return shares(*args)

    monkeypatch.setattr(run_log.Trainer, "training_step", training_step)
    monkeypatch.setattr(validation, "shares", slowly)
    for module in (run_log, validation):
        monkeypatch.setattr(module, "time", clock)
    train(2, **STEPS)
    lines = run_log.read_log(tmp_path / "stage2" / artifacts.TRAINER_LOG)
    assert len({line["tokens_per_second"] for line in lines if "loss" in line}) == 1
    assert [line["eval_runtime"] for line in lines if "eval_loss" in line] == [1000, 1000]
    assert [line["elapsed_seconds"] for line in lines] == [1, 2, 1002, 1003, 1004, 2004]


def test_memory_is_given_back(monkeypatch):
    """As if on a GPU: of weights, buffers and AdamW's moments, though others still hold them."""
    model = torch.nn.BatchNorm1d(4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    held = [*model.parameters(), *model.buffers(), *(value for of_one in optimizer.state.values()
                                                     for value in of_one.values())]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    ranked.release(argparse.Namespace(model=model, optimizer=optimizer))
    assert len(held) == 11 and all(tensor.untyped_storage().nbytes() == 0 for tensor in held)


# Mistakes.

@pytest.fixture
def parse(tmp_path):
    def run(*flags, train="train_q.json", settings=None, **files):
        for name, text in {train: "[]", "map": "m", **files}.items():
            (tmp_path / name).write_text(text)
        for name, found in (settings or {}).items():
            (tmp_path / name).write_text(json.dumps(found))
        return arguments.parse(arguments.SFTArguments, [
            "--model_name_or_path", "M", "--output_dir", str(tmp_path / "O"), "--data_path", str(tmp_path / train),
            "--gps_mapping_path", str(tmp_path / "map"), *flags])
    return run


VALIDATES = ["--eval_strategy", "steps"]


@pytest.mark.parametrize("flags, message", [
    (["--eval_strategy", "epoch"], "validate_q.txt not found; make it with `python data-preprocess/process_llm_gps.py"),
    ([*VALIDATES, "--eval_data_path", "nowhere.txt"], "nowhere.txt: not found; make it with"),
    (["--eval_data_path", "map"], "--eval_data_path: goes with validation; add --eval_strategy"),
    (["--eval_limit", "3"], "--eval_limit: goes with"),
    (["--early_stopping_patience", "3"], "--early_stopping_patience: goes with"),
    ([*VALIDATES, "--early_stopping_patience", "0"], "--early_stopping_patience 0: must be at least 1"),
    ([*VALIDATES, "--eval_steps", "-1"], "--eval_steps -1.*must be more than 0"),
    ([*VALIDATES, "--eval_limit", "-1"], "--eval_limit -1: must be at least 0"),
    ([*VALIDATES, "--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size 0: must be at least 1"),
    ([*VALIDATES, "--metric_for_best_model", "accuracy"], "--metric_for_best_model accuracy: .*eval_loss"),
    ([*VALIDATES, "--greater_is_better", "True"], "leave out .*--greater_is_better"),
    ([*VALIDATES, "--bf16_full_eval", "True"], "--bf16_full_eval: "),
    ([*VALIDATES, "--lr_scheduler_type", "reduce_lr_on_plateau"], "--lr_scheduler_type reduce_lr_on_plateau: its rate"),
    (["--load_best_model_at_end", "True"], "save and eval strategy"),
    (["--eval_strategy", "epoch", "--load_best_model_at_end", "True"], "save and eval strategy"),
    ([*VALIDATES, "--eval_steps", "2", "--save_steps", "4", "--load_best_model_at_end", "True"],
     "--load_best_model_at_end True: .*give --eval_steps 4, as --save_steps"),
    ([*VALIDATES, "--eval_steps", "3", "--save_steps", "4", "--load_best_model_at_end", "True"], "eval_steps|multiple"),
])
def test_flags_that_are_refused(parse, flags, message):
    with pytest.raises(UserError, match=message) as error:
        parse(*flags)
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_the_questions_beside_the_training_ones(parse, tmp_path):
    args = parse(*VALIDATES, "--save_steps", "7", **{"validate_q.txt": "x"})
    assert args.eval_data_path == str(tmp_path / "validate_q.txt") and args.eval_steps == 7
    assert args.per_device_eval_batch_size == args.per_device_train_batch_size
    planned = parse("--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end", "True",
                    "--dry_run", "True")
    assert planned.evaluates and planned.eval_strategy == "no" and planned.eval_data_path == args.eval_data_path
    with pytest.raises(UserError, match="validate_q.txt: questions to be tested on.*--eval_data_path"):
        parse(*VALIDATES, train="validate_q.txt")
    with pytest.raises(UserError, match="pairs.json has no validation questions beside it; give --eval_data_path"):
        parse(*VALIDATES, train="pairs.json")
    with pytest.raises(UserError, match="-dataset_name nyc -validate True` and the training questions' other flags"):
        (tmp_path / "validate_q.txt").unlink()
        parse(*VALIDATES, settings={"train_q.settings.json": {"dataset": "nyc", "stage": 2}})


@pytest.mark.parametrize("theirs, what", [
    ({"stage": 1, "fields": ["poi"]}, "are of stage 1"), ({"stage": 2, "fields": ["gps"]}, r"show \['gps'\]"),
    ({"stage": 2, "fields": ["poi"], "answer": "token"}, "are answered by token")])
def test_questions_of_another_kind(parse, theirs, what):
    with pytest.raises(UserError, match=f"validate_q.txt: its questions {what}, those of --data_path"):
        parse(*VALIDATES, settings={"train_q.settings.json": {"stage": 2, "fields": ["poi"]},
                                    "validate_q.settings.json": theirs}, **{"validate_q.txt": "x"})


def test_questions_of_another_mapping(train, tmp_path):
    (tmp_path / "other.txt").write_text("<question>: at <GPS 77>. Where next? <answer>: user 1 will visit POI id 3.\n")
    with pytest.raises(UserError, match="other.txt, pair 0: <GPS 77> has no row in .*gps_mapping.csv; give"):
        train(2, eval_data_path=tmp_path / "other.txt", **STEPS)
