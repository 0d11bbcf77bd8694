"""run_experiment.py: every row can be planned, its flags exist, and a chain runs from raw check-ins to the table."""
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT, run
from harness import call, refusal

ROWS = sorted(path.name for path in (ROOT / "experiments").glob("*.yml"))
SCRIPTS = ("run.py", "traj_qk.py", "traj_sim.py", "poi_embeddings.py", "process_llm_gps.py", "process_pam_stage1.py",
           "process_projector_gps_stage1.py")
ROW = """table: a table
row: {row}
dataset: sample
pam: false
"""
SCALE = {"model": ["tools/make_tiny_llama.py", "--hidden", "32", "--kv_heads", "2"], "backbone": "a tiny Llama",
         "processes": 1, "questions": {"max_history": 4}, "stage_1_questions": {"max_history": 1},
         "training": {"bf16": False, "load_in_4bit": False, "model_max_length": 2048, "max_steps": 2, "save_steps": 2,
                      "logging_steps": 1, "save_strategy": "steps", "per_device_train_batch_size": 2},
         "gcim": {"lora_r": 4, "lora_alpha": 8},
         "stage_2": {"train_encoders": True, "loss_on": "poi_ids", "dropout": 0.1},
         "test": {"limit": 8, "seq_len": 2048, "context_size": 2048, "full_table": True}}


@pytest.fixture
def place(tmp_path):
    """A copy of what a plan reads, with stand-ins for raw files and models, which a plan does not open."""
    for name in ("experiments", "best_conf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for conf in (tmp_path / "best_conf").glob("*.yml"):
        for raw in re.findall(r"data-preprocess/data/\S+", conf.read_text()):
            (tmp_path / raw).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / raw).write_text("raw")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    for row in (tmp_path / "experiments").glob("embeddings_*.yml"):
        named = (yaml.safe_load(row.read_text()).get("embeddings") or {}).get("from")
        if named:
            (tmp_path / named).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / named).write_text("vectors")
    return tmp_path


@pytest.fixture(scope="module")
def known_flags():
    """{script: the flags it takes}, as it says itself."""
    import finetune_GCIM
    import finetune_LLM_with_GCIM
    import finetune_PAM
    found = {module.__name__ + ".py": {f"--{field.name}" for field in dataclasses.fields(arguments)}
             for module, arguments in ((finetune_GCIM, finetune_GCIM.Stage1Arguments),
                                       (finetune_LLM_with_GCIM, finetune_LLM_with_GCIM.Stage2Arguments),
                                       (finetune_PAM, finetune_PAM.PAMArguments))}
    for script in (*(f"data-preprocess/{name}" for name in SCRIPTS), "test_next_gps.py", "tools/make_tiny_llama.py",
                   "tools/get_smollm2.py"):
        found[script] = set(re.findall(r"--?[a-z]\w*", call(ROOT, script, "--help").out))
    return found


@pytest.mark.parametrize("scale", ["cpu_modules", "cpu_pointer_alone", "gpu", "gpu_pointer", "gpu_released"])
def test_every_row_can_be_planned(place, known_flags, scale):
    """All rows at once, by one command; each command names a script and flags that there are."""
    result = call(place, "run_experiment.py", *(f"experiments/{name}" for name in ROWS), "--scale", scale, "--plan",
                  "--model", "model")
    assert result.code == 0, result.err
    commands = [line for line in result.out.splitlines() if re.match(r"(python|torchrun) ", line)]
    assert len(commands) > len(ROWS) / 2
    for command in commands:
        script = next(part for part in command.split() if part.endswith(".py"))
        flags = {part for part in command.split() if re.fullmatch(r"--?[a-z]\w*", part)}
        if script in known_flags:
            assert flags <= known_flags[script] | {"--standalone", "--nproc_per_node"}, command
    assert not (place / "runs").exists()


def test_an_encoder_that_begins_in_stage_2(place):
    """It is trained there, and tested as it ended there."""
    result = call(place, "run_experiment.py", "experiments/pointer_input_cells_nyc.yml", "--scale", "cpu_pointer",
                  "--plan")
    (training,) = re.findall(r"^torchrun .*finetune_LLM_with_GCIM.py .*", result.out, re.M)
    (test,) = re.findall(r"^python test_next_gps.py .*", result.out, re.M)
    (folder,) = re.findall(r"--output_dir (\S+)", training)
    assert "--geo_encoder cells --train_encoders True" in training
    assert f"--geoencoder_path {folder}/geo_encoder_final_merged.pth" in test


def test_the_released_scale_has_the_flags_of_the_page():
    """Every flag of docs/differences.md that gives the released code's behaviour; but those of its variants."""
    scale = yaml.safe_load((ROOT / "experiments/scales/gpu_released.yml").read_text())
    given = {f"{flag} {value}" for section in scale.values() if isinstance(section, dict)
             for flag, value in section.items()}
    rows = [line.split("|")[4] for line in (ROOT / "docs/differences.md").read_text().splitlines()
            if line.count("|") == 5]
    named = {flag for cell in rows for flag in re.findall(r"`--?(\w+ [\w-]+)`", cell)}
    assert named - {"projector gelu", "protocol llm4poi"} == given


def test_rows_of_one_table_share_what_they_can(place):
    """Quadkey levels change GCIM and what builds on it, not samples, questions, model and PAM; a protocol changes the
    test alone, a seed all trainings but those that have one of their own."""
    def ids(name):
        out = call(place, "run_experiment.py", f"experiments/{name}.yml", "--scale", "cpu_modules", "--plan").out
        return set(re.findall(r"\b(\w+-[0-9a-f]{12})\b", out))

    main_nyc = (place / "experiments/main_nyc.yml").read_text()
    (place / "experiments/seed.yml").write_text(main_nyc + "training: {seed: 43}\n")
    main = ids("main_nyc")
    for row, expected in (("level_24_nyc", {"gcim", "stage2", "test"}), ("main_sthgcn_nyc", {"test"}),
                          ("seed", {"stage2", "test"})):
        found = ids(row)
        assert {name.rpartition("-")[0] for name in found - main} == expected and len(main & found) >= 6, row


def test_a_scale_like_another_has_its_flags_save_its_own(place):
    """So its steps are those of the same scale written out in full: the same commands in the same folders."""
    def plan(scale):
        found = call(place, "run_experiment.py", "experiments/main_nyc.yml", "--scale", scale, "--plan")
        assert found.code == 0, found.err
        return found.out

    base = yaml.safe_load((place / "experiments/scales/cpu_pointer.yml").read_text())
    model = ["tools/make_tiny_llama.py", "--words", "{questions}"]
    for name, scale in (("full", {**base, "model": model}), ("other", {"like": "cpu_pointer", "model": model})):
        (place / f"experiments/scales/{name}.yml").write_text(yaml.safe_dump(scale, sort_keys=False))
    assert plan("full") == plan("other") != plan("cpu_pointer")
    (place / "experiments/scales/more.yml").write_text("like: cpu_pointer\nquestions: {thinned: 7}\n")
    assert [plan(scale).count(" -thinned 6 -missing 0.2") for scale in ("cpu_pointer", "more")] == [1, 0]
    assert plan("more").count(" -thinned 7 -missing 0.2") == 1
    for text, names in (("like: nothing\n", ["like", "cpu_pointer"]),
                        ("like: cpu_pointer_alone\n", ["unknown key like"]), ("model: m\n", ["backbone"]),
                        ("like: cpu_pointer\nprocesses: 0\n", ["processes"])):
        (place / "experiments/scales/bad.yml").write_text(text)
        refusal(call(place, "run_experiment.py", "experiments/main_nyc.yml", "--scale", "bad", "--plan"), *names)


def test_a_member_may_have_a_scale_of_its_own(place):
    """Its chain is that of the row by itself at that scale, but for the test, which writes the table."""
    def ids(*flags):
        result = call(place, "run_experiment.py", *flags, "--plan")
        assert result.code == 0, result.err
        return set(re.findall(r"\b(\w+-[0-9a-f]{12})\b", result.out))

    row = (place / "experiments/pointer_nyc.yml").read_text()
    (place / "experiments/with_alone.yml").write_text(f"{row}members: [pointer_nyc@cpu_pointer_alone]\n")
    mean = ids("experiments/with_alone.yml", "--scale", "cpu_pointer")
    own, other = (ids("experiments/pointer_nyc.yml", "--scale", name) for name in ("cpu_pointer", "cpu_pointer_alone"))
    assert {step for step in own | other if not step.startswith("test")} < mean
    assert sum(step.startswith("test") for step in mean) == 2


def test_seeds_are_not_for_means(place):
    """A row that averages models of its own seeds is run as it stands, beside rows of single ones."""
    def plan(*names, seeds=()):
        result = call(place, "run_experiment.py", *(f"experiments/{name}.yml" for name in names), "--scale",
                      "cpu_pointer", "--plan", *seeds)
        assert result.code == 0, result.err
        return result.out

    seeds = ["--seeds", "4,5"]
    assert plan("pointer_mean_nyc", seeds=seeds) == plan("pointer_mean_nyc")
    assert plan("pointer_nyc", seeds=seeds) != plan("pointer_nyc")
    assert plan("pointer_mean_nyc", "pointer_nyc", seeds=seeds).count(" --average_with ") == 1


@pytest.mark.parametrize("change, flags, names", [
    (None, ["--scale", "mainframe"], ["--scale mainframe", "cpu_pointer"]),
    ("table: [1]\nrow: x\ndataset: nyc\n", [], ["bad.yml", "table"]), ("row: x\n", [], ["bad.yml", "table"]),
    ("table: t\nrow: x\ndataset: ../nyc\n", [], ["bad.yml", "dataset"]), ("table: t\nrow: x\n", [], ["dataset"]),
    ("table: t\nrow: x\ndataset: nyc\nstage_3: {}\n", [], ["stage_3"]), ("a: [", [], ["bad.yml", "not YAML"]),
    ("table: t\nrow: x\ndataset: nyc\npublished: {Acc@1: 39.88}\nsource: s\n", [], ["published"]),
    ("table: t\nrow: x\ndataset: nyc\nstage_2: false\n", [], ["stage_2"]),
    ("table: t\nrow: x\ndataset: nyc\nmembers: main_nyc\n", [], ["bad.yml", "members"]),
    ("table: t\nrow: x\ndataset: nyc\nmean_of_seeds: [1, 1]\n", [], ["mean_of_seeds", "different"]),
    ("table: t\nrow: x\ndataset: nyc\nmembers: [nobody]\n", [], ["bad.yml: members", "no experiments/nobody.yml"]),
    ("table: t\nrow: x\ndataset: nyc\nmembers: [../nobody]\n", [], ["bad.yml: members", "nobody.yml"]),
    ("table: t\nrow: x\ndataset: nyc\nreference: nobody\n", [], ["bad.yml: reference", "no experiments/nobody.yml"]),
    ("table: t\nrow: x\ndataset: nyc\nmembers: [bad]\n", [], ["bad.yml", "leave members"]),
    ("table: t\nrow: x\ndataset: nyc\nmembers: [main_nyc@none]\n", [], ["bad.yml: members: main_nyc@none", "choose"]),
    ("table: t\nrow: x\ndataset: nyc\nbackbone: GPT-9\n", [], ["GPT-9", "--model"]),
    ("table: t\nrow: x\ndataset: nyc\n", ["--model", "nowhere"], ["nowhere", "--model"]),
    ("table: t\nrow: x\ndataset: nyc\nembeddings: {from: data/none.npy}\n", [], ["data/none.npy", "128"]),
    ("table: t\nrow: x\ndataset: nyc\nstage_2: {load_best_model_at_end: true}\n", [], ["load_best_model_at_end"])],
    ids=["scale", "kind", "no table", "path", "no data set", "section", "YAML", "percent", "left out", "members",
         "a seed twice", "a member that is not there", "a member elsewhere", "a reference", "a member that is a mean",
         "a member's scale", "backbone", "model", "vectors", "another step"])
def test_refusals(place, change, flags, names):
    (place / "experiments/bad.yml").write_text(change or "table: t\nrow: x\ndataset: nyc\n")
    scale = [] if "--scale" in flags else ["--scale", "cpu_pointer"]
    refusal(call(place, "run_experiment.py", "experiments/bad.yml", "--plan", *scale, *flags), *names)


@pytest.mark.slow
def test_all_as_the_released_code_does_it(repo, steps_are_forked):
    """The flags of the scale gpu_released, all at once, on a tiny model: from raw check-ins to a row of the table."""
    released = yaml.safe_load((ROOT / "experiments/scales/gpu_released.yml").read_text())
    del released["like"]
    tiny = {name: section for name, section in SCALE.items() if name not in ("stage_2", "test")} | {
        "pam": {"lora_r": 4, "lora_alpha": 8}, "test": {"limit": 8, "seq_len": 2048, "context_size": 2048}}
    tiny |= {name: {**tiny.get(name, {}), **section} for name, section in released.items()}
    (repo / "experiments/scales/tiny_released.yml").write_text(yaml.safe_dump(tiny))
    (repo / "experiments/both.yml").write_text(ROW.format(row="both").replace("pam: false\n", ""))
    result = call(repo, "run_experiment.py", "experiments/both.yml", "--scale", "tiny_released")
    assert result.code == 0, result.err
    told = json.loads((repo / "runs/experiments/tiny_released/both.json").read_text())
    metrics = json.loads((repo / "runs/experiments" / told["metrics"]).read_text())
    assert metrics["decoding"] == "sample" and metrics["n"] == 8 and set(metrics["all"]["model"]) >= {"n", "Acc@1"}
    assert "released_prompt" in told["metrics"] and "base_norms" in told["metrics"]
    table = call(repo, "results.py", "--others", "nowhere", "--out", "runs/table")
    assert "| both | 8 | " in table.out
    subprocess.run(["rm", "-r", str(repo / "runs/experiments")], check=True)


@pytest.mark.slow
def test_from_raw_check_ins_to_the_table(repo, request, caplog):
    """A row by one command, as users start it; then a second that shares all but GCIM, a third that is both of them
    averaged, and all in the table; again, nothing runs."""
    (repo / "experiments/scales/tiny.yml").write_text(yaml.safe_dump(SCALE))
    (repo / "experiments/with.yml").write_text(ROW.format(row="with") + "published: {Acc@1: 0.5}\nsource: nobody\n")
    (repo / "experiments/without.yml").write_text(ROW.format(row="without") + "gcim: false\nreference: with\n")
    (repo / "experiments/mean.yml").write_text(ROW.format(row="mean") + "gcim: false\nmembers: [with]\n")
    rows = [f"experiments/{name}.yml" for name in ("with", "without", "mean")]
    first = run(repo, sys.executable, "run_experiment.py", rows[0], "--scale", "tiny").stderr
    assert first.count("done in") == 7 and "done before" not in first, first
    request.getfixturevalue("steps_are_forked")
    caplog.set_level("INFO")
    for done, before in ((3 + 1, 7 + 2 + 9), (0, 7 + 5 + 10)):
        caplog.clear()
        result = call(repo, "run_experiment.py", *rows, "--scale", "tiny")
        assert result.code == 0, result.err
        assert (caplog.text.count("done in"), caplog.text.count("done before")) == (done, before), caplog.text
    told = json.loads((repo / "runs/experiments/tiny/with.json").read_text())
    test, = (repo / "runs/experiments/steps").glob(f"{told['step']}/step.json")
    assert re.search(r"--geoencoder_path \S*/stage2-\w+/out/geo_encoder_final_merged.pth", test.read_text())
    metrics = json.loads((repo / "runs/experiments" / told["metrics"]).read_text())
    assert metrics["n"] == 8 and told["published"] == {"Acc@1": 0.5}
    table = run(repo, sys.executable, "results.py", "--others", "nowhere", "--out", "runs/table").stdout
    assert "| with | 8 | " in table and "| with | .5000 (" in table and "user-history" in table
    assert Path(repo / "runs/table.csv").read_text().count("\n") == 4
    mean = json.loads((repo / "runs/experiments/tiny/mean.json").read_text())
    both = json.loads((repo / "runs/experiments" / mean["metrics"]).read_text())["all"]
    without = json.loads((repo / "runs/experiments/tiny/without.json").read_text())
    assert "average2" in mean["metrics"] and both["model"]["n"] == 8
    alone = json.loads((repo / "runs/experiments" / without["metrics"]).read_text())["all"]
    assert both["model alone"] == alone["model"]
    assert call(repo, "results.py", "--keep").code == 0
    kept = json.loads((repo / "results/tiny/with.json").read_text())
    assert kept["found"] == metrics["all"] and kept["training"].keys() == {"gcim", "stage2"}
    assert kept["training"]["stage2"]["steps"] == 2 and kept["seconds"].keys() > {"samples", "gcim", "stage2", "test"}
    subprocess.run(["rm", "-r", str(repo / "runs/experiments"), str(repo / "results")], check=True)
