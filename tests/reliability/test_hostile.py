"""Files from strangers: nothing in them is executed, and nothing outside our own folders is written to or deleted."""
import ast
import json
import os
import shutil
from functools import partial

import forked
import numpy as np
import pytest
import torch
from commands import few_pairs, needs_deepspeed
from harness import ROOT, call, refusal, snapshot
from safetensors.torch import load_file
from strangers import (CONFIG, TRAINED, Payload, both, copy, cut, edit_json, edit_tensors, evaluate, legacy,
                       predictions, raw, remove, resume, tar, write, zipped)

from ga_llm.base.artifacts import MERGED_ENCODER
from ga_llm.training import staging

pytestmark = pytest.mark.bulk
FORMATS = {"zip": zipped, "legacy": legacy, "raw": raw, "tar": tar}
CODE = "import os\nos.mkdir({mark!r})\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"


@pytest.fixture
def mark(tmp_path):
    """What a payload makes; it must not be there in the end."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()


def test_the_payloads_work(tmp_path):
    """Without our care each of them does what it is for."""
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
    for name, save in FORMATS.items():
        file, mark = tmp_path / name, tmp_path / f"{name} mark"
        save(file, {"a": Payload(mark)})
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
            try:
                torch.load(file, weights_only=False)  # hostile: on purpose
            except Exception:       # it is no file of weights, but the harm is done
                pass
        assert mark.exists()


# What evaluation reads.

@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
def test_encoder(repo, tmp_path, mark, save):
    file = tmp_path / "1" / MERGED_ENCODER
    file.parent.mkdir()
    save(file, {"gps_embed_model.gps_embedding.weight": Payload(mark)})
    before = snapshot(tmp_path)
    refusal(evaluate(repo, tmp_path / "results", "--test_type", "projector", "--geoencoder_path", file), str(file))
    assert not (tmp_path / "results/projector_limit4/predictions.jsonl").exists()
    shutil.rmtree(tmp_path / "results", ignore_errors=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin/pytorch_model.bin",
                                  "pytorch_model.bin/pytorch_model-00001-of-00002.bin"])
@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
def test_converted_weights(repo, tmp_path, mark, name, save):
    checkpoint = copy(repo / "outputs/llm/checkpoint-6", tmp_path / "checkpoint-6")
    (checkpoint / name).parent.mkdir(exist_ok=True)
    save(checkpoint / name, {"base_model.model.model.norm.weight": Payload(mark)})
    refusal(evaluate(repo, checkpoint), str(checkpoint / name))


def evil_code(folder, mark):
    (folder / "modeling_evil.py").write_text(CODE.format(mark=str(mark)))


def pickled_model(folder, mark):
    weights = load_file(folder / "model.safetensors")
    torch.save({**weights, "model.norm.weight": Payload(mark)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(name):
    """The weights lie elsewhere, and an index says where."""
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": dict.fromkeys(weights, name.format(folder=folder.parent))}))
    return change


MODEL = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
MODELS = {
    "code of its own": (edit_json("config.json", model_type="evil", auto_map=MODEL), "code of its own"),
    "a tokenizer's own code": (edit_json("tokenizer_config.json", tokenizer_class="Evil", auto_map={
        "AutoTokenizer": ["modeling_evil.Model", "modeling_evil.Model"]}), "code of its own"),
    "only a pickle": (None, "it would call"),
    "an index that leads up": (sharded("../elsewhere.safetensors"), "'../elsewhere.safetensors', which does not lie"),
    "an index that leads away": (sharded("{folder}/elsewhere.safetensors"), "which does not lie beside it"),
    "an index that leads nowhere": (sharded("nowhere.safetensors"), "names nowhere.safetensors, which is not there"),
    "an index of nothing": (both(sharded("x"), write("model.safetensors.index.json", "{}")), "no weight_map"),
    "an index cut off": (both(sharded("x"), cut("model.safetensors.index.json")), "not JSON"),
    "a tokenizer cut off": (cut("tokenizer.json"), "not a usable model folder"),
    "an empty tokenizer": (write("tokenizer.json", "{}"), "not a usable model folder"),
    "no tokenizer": (remove("tokenizer.json"), "not a usable model folder"),
    "a list for a tokenizer's settings": (write("tokenizer_config.json", "[]"), "not a usable model folder"),
    "a list for generation settings": (write("generation_config.json", "[1]"), "not a usable model folder"),
    "absurdly wide": (edit_json("config.json", hidden_size=10**9), "1.7e+12 weights, which do not fit"),
    "absurdly deep": (edit_json("config.json", num_hidden_layers=10**9), "weights, which do not fit"),
    "absurdly many tokens": (edit_json("config.json", vocab_size=10**9), "weights, which do not fit"),
    "absurdly large inside": (edit_json("config.json", intermediate_size=10**9), "weights, which do not fit"),
    "no heads": (edit_json("config.json", num_attention_heads=0), "not a usable model folder"),
    "a text for a number": (edit_json("config.json", num_attention_heads="x"), "num_attention_heads"),
    "no positions": (edit_json("config.json", max_position_embeddings=0), "a size below 1"),
    "positions of an unknown kind": (edit_json("config.json", rope_parameters={"rope_type": "evil"}), "(evil) cannot"),
    "a type that is no type": (edit_json("config.json", dtype="os.system"), "not a usable model folder"),
    "an unknown activation": (edit_json("config.json", hidden_act="evil"), "not a usable model folder"),
    "quantized by what is not here": (edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
                                      "GPTQ"),
    "quantized by a text": (edit_json("config.json", quantization_config="x"), "not a usable model folder"),
    "a list for a configuration": (write("config.json", "[]"), "not a usable model folder"),
    "a configuration cut off": (cut("config.json"), "config.json"),
    "no configuration": (remove("config.json"), "config.json"),
    "another kind of model": (edit_json("config.json", model_type="bert"), "is missing from its weights"),
    "weights cut off": (cut("model.safetensors"), "not a usable model folder"),
    "empty weights": (write("model.safetensors", ""), "do not fit into the 0 bytes"),
    "no weights": (remove("model.safetensors"), "no file named model.safetensors"),
    "a layer too few": (edit_json("config.json", num_hidden_layers=3), "model.layers.2.input_layernorm.weight is miss"),
    "a weight too few": (edit_tensors("model.safetensors", lambda weights: weights.pop("model.norm.weight")),
                         "model.norm.weight is missing"),
    "a weight of another shape": (edit_tensors("model.safetensors", lambda weights: weights.update(
        {"model.norm.weight": torch.ones(9)})), "do not have the sizes"),
    "a weight that is no number": (edit_tensors("model.safetensors", lambda weights: weights["model.norm.weight"].fill_(
        float("nan"))), "model.norm.weight holds NaN"),
    "an adapter in it": (write(CONFIG, json.dumps({"peft_type": "LORA", "base_model_name_or_path": "models/tiny"})),
                         "holds an adapter"),
}


@pytest.mark.parametrize("change, message", MODELS.values(), ids=MODELS)
def test_base_model(repo, tmp_path, mark, change, message):
    model = copy(repo / "models/tiny", tmp_path / "model", change or partial(pickled_model, mark=mark))
    evil_code(model, mark)
    before = snapshot(model)
    line = refusal(evaluate(repo, tmp_path / "results", "--test_type", "projector", "--base_model", model), message)
    assert str(model) in line and snapshot(model) == before


@pytest.mark.parametrize("change", [
    edit_json("config.json", auto_map=MODEL),
    edit_json("config.json", quantization_config={"quant_method": "evil"}),
    edit_json("config.json", _attn_implementation="evil/kernel", attn_implementation="evil/kernel"),
    edit_json("config.json", architectures=["Evil"]),
    write("generation_config.json", "{"),
], ids=["its own code", "an unknown quantization", "a kernel from the hub", "an unknown class", "generation cut off"])
def test_base_model_that_needs_none_of_it(repo, tmp_path, mark, change):
    """Its own code is left alone, and the results are those of the model without it."""
    found = []
    for name in ("plain", "changed"):
        model = copy(repo / "models/tiny", tmp_path / name, change if name == "changed" else lambda folder: None)
        evil_code(model, mark)
        checkpoint = copy(repo / "outputs/llm/checkpoint-6", tmp_path / f"{name} checkpoint")
        assert evaluate(repo, checkpoint, "--base_model", model).code == 0
        found.append(predictions(checkpoint))
    assert found[0] == found[1]


ADAPTERS = {
    "prompt tuning": (dict(peft_type="PROMPT_TUNING", num_virtual_tokens=4), "num_virtual_tokens"),
    "x-lora": (dict(peft_type="XLORA"), "peft_type is 'XLORA'"),
    "a type that is none": (dict(peft_type=["LORA"]), "peft_type"),
    "a module to import": (dict(megatron_config={"a": 1}, megatron_core="evil"), "megatron_c"),
    "another module to import": (dict(megatron_core="evil"), "megatron_core"),
    "a class to import": (dict(auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}), "auto_mapping"),
    "settings of a run": (dict(runtime_config={"ephemeral_gpu_offload": True}), "runtime_config"),
    "layers repeated": (dict(layer_replication=[[0, 2]] * 1000), "layer_replication"),
    "an absurd rank": (dict(r=10**9), "r is '1000000000', and the weights in adapter_model.safetensors have rank 8"),
    "rank 0": (dict(r=0), "r is '0'"),
    "a text for a rank": (dict(r="8"), "r is '8'"),
    "a rank for each layer": (dict(rank_pattern={"(a|a)*": 4}), "rank_pattern"),
    "an endless alpha": (dict(lora_alpha=float("inf")), "lora_alpha is 'inf'"),
    "a text for alpha": (dict(lora_alpha="16"), "lora_alpha"),
    "an impossible dropout": (dict(lora_dropout=7), "lora_dropout"),
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights"),
    "eva": (dict(init_lora_weights="eva"), "init_lora_weights"),
    "corda": (dict(init_lora_weights="corda"), "init_lora_weights"),
    "dora": (dict(use_dora=True), "use_dora"),
    "another scale": (dict(use_rslora=True), "use_rslora"),
    "biases": (dict(bias="all"), "bias"),
    "more modules": (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    "a field nobody knows": (dict(evil="x"), "evil is 'x'"),
    "an expression for targets": (dict(target_modules="(a+)+$"), "target_modules"),
    "expressions for targets": (dict(target_modules=["q_proj", "(a+)+$"]), "target_modules"),
    "no targets": (dict(target_modules=[]), "target_modules"),
    "targets that are not there": (dict(target_modules=["nothing"]), "does not fit the base model"),
    "fewer targets": (dict(target_modules=["q_proj"]), "no place for"),
    "more targets": (dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]), "is missing"),
}


@pytest.mark.parametrize("fields, message", ADAPTERS.values(), ids=ADAPTERS)
def test_adapter_config(repo, tmp_path, fields, message):
    checkpoint = copy(repo / "outputs/llm/checkpoint-6", tmp_path / "checkpoint-6", edit_json(CONFIG, **fields))
    before = snapshot(checkpoint)
    assert str(checkpoint) in refusal(evaluate(repo, checkpoint), message)
    assert {**snapshot(checkpoint), ".lock": None} == {**before, ".lock": None}


def test_adapter_that_names_another_place(repo, tmp_path):
    """Where its base model came from is nobody's business; an old PEFT's configuration is one like any other."""
    few = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "task_type", "peft_type")
    found = []
    for name, change in {"plain": lambda folder: None,
                         "named": edit_json(CONFIG, base_model_name_or_path="https://evil.example/model", revision="x"),
                         "old": lambda folder: (folder / CONFIG).write_text(json.dumps(
                             {key: json.loads((folder / CONFIG).read_text())[key] for key in few}))}.items():
        checkpoint = copy(repo / "outputs/llm/checkpoint-6", tmp_path / name, change)
        assert evaluate(repo, checkpoint).code == 0
        found.append(predictions(checkpoint))
    assert found[0] == found[1] == found[2]


# What a resumed training reads.

@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "scheduler.pt", "scaler.pt"])
@pytest.mark.parametrize("save", [zipped, raw])
def test_resumed_checkpoint(repo, tmp_path, mark, name, save):
    checkpoint = copy(repo / "outputs/llm/checkpoint-4", tmp_path / "O/checkpoint-4")
    save(checkpoint / name, {"python": Payload(mark)})
    before = snapshot(checkpoint)
    refusal(resume(repo, 2, tmp_path / "O"), str(checkpoint / name), "it would call posix.mkdir")
    assert snapshot(checkpoint) == before and [path.name for path in (tmp_path / "O").glob("*/")] == ["checkpoint-4"]


def test_files_that_a_resumed_training_leaves_alone(repo, tmp_path, mark):
    """Pickled flags, weights as transformers or zero_to_fp32.py would write them, adapters beside ours."""
    ends = []
    for name in ("plain", "changed"):
        checkpoint = copy(repo / "outputs/llm/checkpoint-4", tmp_path / name / "checkpoint-4")
        if name == "changed":
            (checkpoint / "other").mkdir()
            for file in ("training_args.bin", "pytorch_model.bin", "other/adapter_model.bin"):
                zipped(checkpoint / file, {"base_model.model.model.norm.weight": Payload(mark)})
            (checkpoint / "other" / CONFIG).write_text('{"peft_type": "PROMPT_TUNING"}')
        result = resume(repo, 2, tmp_path / name)
        assert result.code == 0, result.err
        ends.append(load_file(tmp_path / name / "checkpoint-6" / TRAINED))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_tokens_that_are_pickled(repo, tmp_path, mark):
    """The cache of a training file: an array of objects is a pickle."""
    flags = ["--cache_dir", tmp_path / "cache", "--max_steps", "1"]
    forked.train(repo, 2, tmp_path / "one", *flags)
    index, = (tmp_path / "cache").glob("tokens-*/index.npy")
    np.save(index, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    result = forked.run(repo, forked.training(2, tmp_path / "two", *flags), tmp_path / "two.log", **forked.ranks())
    if result.code:
        refusal(result, str(index.parent))
    else:       # it is built anew
        assert np.load(index).dtype == np.int64


STACKS = {
    "zero2": (["--deepspeed", "ds_configs/stage2.json"], ["global_step*/mp_rank_00_model_states.pt",
                                                         "global_step*/*_optim_states.pt", "scheduler.pt"]),
    "zero3": (["--deepspeed", "ds_configs/stage3.json"], ["global_step*/*_model_states.pt",
                                                         "global_step*/*_optim_states.pt"]),
    "fsdp2": (["--fsdp", "True"], ["pytorch_model_fsdp.bin", "optimizer.bin", "rng_state_0.pth"]),
}


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("stack", STACKS)
def test_resumed_checkpoint_in_pieces(repo, tmp_path, stack, stage):
    """DeepSpeed's files and FSDP's, in place of which a payload is put; the genuine ones are gone on from."""
    if stack != "fsdp2":
        needs_deepspeed()
    flags, patterns = STACKS[stack]
    flags = [*flags, "--load_in_4bit", "False", "--bf16", "False", "--data_path", few_pairs(repo, stage, 12)]
    source, mark = tmp_path / "source", tmp_path / "mark"
    forked.train(repo, stage, source, *flags, "--max_steps", "2", processes=2)
    changes = [(pattern, save) for pattern in patterns for save in (zipped, raw)]
    for i, (pattern, save) in enumerate([("latest", None), *changes, (None, None)]):
        output = tmp_path / str(i)
        copy(source / "checkpoint-2", output / "checkpoint-2")
        if pattern == "latest":
            if stack == "fsdp2":
                continue
            (output / "checkpoint-2/latest").write_text("../../source/checkpoint-2/global_step2")
        elif pattern:
            for file in sorted((output / "checkpoint-2").glob(pattern))[:1]:
                save(file, {"module": Payload(mark)})
        before = snapshot(output)
        started = forked.start(repo, stage, output, *flags, "--resume_from_checkpoint", "auto", "--max_steps", "4",
                               processes=2)
        for process in started:
            process.join(300)
        log = (tmp_path / f"{i}.log").read_text()
        assert not mark.exists()
        if pattern is None:
            assert (output / "checkpoint-4").is_dir(), log
        else:
            assert {process.exitcode for process in started} <= {2, -6, -15} and "Traceback" not in log, log
            assert snapshot(output) == before
            lines = [line for line in log.splitlines() if line.startswith("error: ")]
            assert lines and all("no folder of DeepSpeed's" in line or "it would call posix.mkdir" in line
                                 for line in lines)


# Settings and names.

@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir ['{mark}']", "dataset_name: !!python/name:os.system",
                                  "a: !!python/object/new:os.mkdir ['{mark}']"])
def test_yaml(repo, tmp_path, mark, text):
    (tmp_path / "evil.yml").write_text(text.format(mark=mark))
    refusal(call(repo, "data-preprocess/run.py", "-f", tmp_path / "evil.yml"), "evil.yml")


@pytest.mark.parametrize("name", ["../evil", "sample/../../evil", "; touch evil", "$(touch evil)"])
def test_names_that_lead_away(repo, tmp_path, name):
    checkpoint = copy(repo / "outputs/llm/checkpoint-6", tmp_path / "checkpoint-6")
    refusal(evaluate(repo, checkpoint, "--dataset_name", name))
    refusal(call(repo, "data-preprocess/traj_qk.py", "-dataset_name", name))
    assert not list(repo.glob("**/evil")) and not (repo.parent / "evil").exists()


# What is deleted.

@pytest.fixture
def precious(tmp_path):
    """A folder that must stay as it is."""
    folder = tmp_path / "precious"
    (folder / "deep").mkdir(parents=True)
    for name in (MERGED_ENCODER, "deep/diary.txt", "model.safetensors"):
        (folder / name).write_text("mine")
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


def test_pruning_in_a_crowded_folder(repo, tmp_path, precious):
    """A run that keeps one checkpoint removes its own, and of what is linked there the links at most."""
    real = tmp_path / "elsewhere"
    real.mkdir()
    output = tmp_path / "output"
    output.symlink_to(real)
    (real / "sub").mkdir()
    for name in ("2", "3", "5", "checkpoint-02", "checkpoint-x", "02"):
        (real / name).symlink_to(precious) if name in "23" else shutil.copytree(precious, real / name)
    (real / "notes").symlink_to(precious / "deep/diary.txt")
    kept = {name: what for name, what in snapshot(real).items() if name.split("/")[0] not in "23"}
    (real / "5" / MERGED_ENCODER).unlink()
    kept.pop(f"5/{MERGED_ENCODER}")
    (real / "02" / MERGED_ENCODER).unlink()
    kept.pop(f"02/{MERGED_ENCODER}")
    for link in ("2", "3"):
        (real / link).unlink()

    flags = ["--save_steps", "1", "--save_total_limit", "1", "--data_path", few_pairs(repo, 1, 6)]
    forked.train(repo, 1, output / "sub/..", *flags, "--max_steps", "1")
    (real / "checkpoint-1/inside").symlink_to(precious)
    (real / "checkpoint-1/file").symlink_to(precious / "deep/diary.txt")
    for link in ("2", "3"):
        (real / link).symlink_to(precious)
    (real / "checkpoint-2").symlink_to(tmp_path / "nowhere")
    forked.train(repo, 1, output, *flags, "--max_steps", "3", "--resume_from_checkpoint", "auto")
    assert sorted(path.name for path in real.glob("*/")) == ["02", "3", "5", "checkpoint-02", "checkpoint-3",
                                                             "checkpoint-x", "sub"]
    assert not (real / "3").is_symlink() and (real / "3" / MERGED_ENCODER).stat().st_size > 1000
    after = snapshot(real)
    assert {name: after.get(name) for name in kept} == kept


@pytest.mark.parametrize("number", [1, 2])
def test_checkpoints_that_are_links(tmp_path, precious, number):
    """Written anew or pruned, the link is gone, and what it led to is not."""
    output = tmp_path / "output"
    output.mkdir()
    (output / f"checkpoint-{number}").symlink_to(precious)
    (output / str(number)).symlink_to(precious)
    for step in (1, 2, 3):
        hidden = staging.staging(output)
        for folder in (hidden / f"checkpoint-{step}", hidden / str(step)):
            folder.mkdir(parents=True)
            (folder / MERGED_ENCODER).write_text("new")
        (hidden / f"checkpoint-{step}/link").symlink_to(precious / "deep")
        staging.publish(output, step, keep=1)
    assert staging.steps(output) == [3] and not staging.staging(output).exists()


@pytest.mark.parametrize("name, kind, message", [
    (".incomplete", "link", "a link; remove it"), (".incomplete", "file", ".incomplete"),
    ("checkpoint-2", "file", "checkpoint-2: a file"), ("6/" + MERGED_ENCODER, "file", "of an earlier run"),
    ("geo_encoder_final_merged.pth", "file", "of an earlier run"),
])
def test_output_folders_that_are_refused(repo, tmp_path, precious, name, kind, message):
    path = tmp_path / "output" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(precious) if kind == "link" else path.write_text("mine")
    command = forked.training(1, tmp_path / "output", "--data_path", few_pairs(repo, 1, 6), "--max_steps", "2")
    refusal(forked.run(repo, command, tmp_path / "log", **forked.ranks()), message, str(path))
    assert path.is_symlink() if kind == "link" else path.read_text() == "mine"


def test_encoders_whose_checkpoints_were_deleted_by_hand_stay(repo, tmp_path):
    """They are all that is left of them, and all that stage 2 needs."""
    flags = ["--save_steps", "1", "--save_total_limit", "3", "--data_path", few_pairs(repo, 1, 6)]
    forked.train(repo, 1, tmp_path / "O", *flags, "--max_steps", "2")
    shutil.rmtree(tmp_path / "O/checkpoint-1")
    encoder = (tmp_path / "O/1" / MERGED_ENCODER).read_bytes()
    forked.train(repo, 1, tmp_path / "O", *flags, "--max_steps", "3", "--resume_from_checkpoint", "auto")
    assert (tmp_path / "O/1" / MERGED_ENCODER).read_bytes() == encoder


# The code itself.

READERS = {"pickle": {"load", "loads", "Unpickler"}, "marshal": {"load", "loads"}, "shelve": {"open"},
           "os": {"system", "popen"}, "joblib": {"load"}, "pd": {"read_pickle", "eval"},
           "yaml": {"full_load", "unsafe_load", "load_all", "full_load_all", "unsafe_load_all"},
           "importlib": {"import_module"}, "hub": {"load"}}
# Each of a hidden folder of its own making.
DELETERS = {"ga_llm/training/staging.py", "ga_llm/pairs/token_cache.py"}


def misuses(source: str, name: str = "ga_llm/x.py") -> list[str]:
    """The calls in a module that execute what a file or a name holds, or delete whole folders."""
    tree, found, is_test = ast.parse(source), [], name.startswith("tests/")
    loaders = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    loaders |= {part.name for part in ast.walk(tree) if isinstance(part, ast.ClassDef)
                and any(ast.unparse(base) in loaders for base in part.bases)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, function = called.rpartition(".")
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        written_here = node.args and ast.unparse(node.args[0]).startswith("pickle.dumps(")
        loader = keywords.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
        wrong = (called in ("eval", "exec", "compile", "__import__")
                 or function in READERS.get(owner.rpartition(".")[2], ()) and not written_here
                 or called == "torch.load" and keywords.get("weights_only", str(is_test)) != "True"
                 or called == "np.load" and keywords.get("allow_pickle", "False") != "False"
                 or called == "yaml.load" and loader not in loaders
                 or keywords.get("shell", "False") != "False"
                 or keywords.get("trust_remote_code", "False") != "False"
                 or function == "rmtree" and name not in DELETERS and not is_test)
        if wrong:
            found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("source", [
    "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)", "yaml.load(x)",
    "yaml.load(x, Loader=yaml.Loader)", "yaml.unsafe_load(x)", "eval(x)", "exec(x)", "pickle.load(x)",
    "pickle.loads(x)", "pickle.Unpickler(x)", "os.system(x)", "subprocess.run(x, shell=True)",
    "f(x, trust_remote_code=True)", "shutil.rmtree(x)", "pd.read_pickle(x)", "importlib.import_module(x)",
    "torch.hub.load(x)",
    "class L(yaml.FullLoader): pass\nyaml.load(x, L)"])
def test_misuses_are_found(source):
    assert len(misuses(source)) == 1


def test_this_repository_executes_no_files():
    modules = [path for path in sorted(ROOT.rglob("*.py"))
               if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    found = [line for path in modules for line in misuses(path.read_text(), str(path.relative_to(ROOT)))
             if path.name != "test_hostile.py"]
    assert len(modules) > 80 and found == []
