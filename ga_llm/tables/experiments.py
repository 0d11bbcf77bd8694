"""An experiment is a YAML of `experiments/`, a row of a table of the paper; a scale one of `experiments/scales/`.

The scale says what all rows have in common (model, lengths, flags), the row what differs. Both hold the same sections,
one for each kind of step, of `flag: value`; the row's flags count, and `gcim: false` leaves that step out. A scale may
name another that it is `like`, and then says only what differs. From row and scale `chain_of` makes the steps from raw
check-ins to metrics.
"""
import dataclasses
import datetime
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import yaml

from ga_llm.base import artifacts, prompts, writing
from ga_llm.base.cli import UserError
from ga_llm.evaluation.metrics import ACC_AT
from ga_llm.tables.chain import LAST_CHECKPOINT, OWN, Made, Step

FOLDER = Path("experiments")
SCALES = FOLDER / "scales"
EXPLAINED = {True: f"see {FOLDER}/main_nyc.yml", False: f"see {SCALES}/cpu_pointer.yml"}

# What makes the questions (of GCIM's and PAM's stage 1, of stage 2), the vectors and the lists; what trains and tests.
SECTIONS = ("stage_1_questions", "pam_questions", "questions", "similar", "embeddings", "training", "gcim", "pam",
            "stage_2", "test")
LEFT_OUT = ("gcim", "pam")      # by `false`; `similar` is there only where the row has it
ROW = ("table", "row", "dataset")
ROW_OPTIONAL = ("reference", "group", "members", "mean_of_seeds", "backbone", "published", "source")
SCALE = ("model", "backbone", "processes")
LIKE = "like"       # of a scale: another one, whose keys and flags it has where it does not say its own
METRICS = tuple(f"Acc@{k}" for k in ACC_AT) + ("MRR", "MRR@5", "MRR@10", "NDCG@10")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One YAML of a row, checked."""
    path: Path
    table: str
    row: str
    dataset: str
    sections: dict                      # section -> {flag: value}, or False
    reference: str | None = None        # the experiment that the table compares this one with
    group: tuple | None = None          # (grouping, group) of metrics.json; None: all pairs
    members: tuple = ()                 # others (`name`, `name@scale`), whose probabilities are averaged with its own
    mean_of_seeds: tuple = ()           # it, and each member, is the mean of models of these seeds
    seed: int | None = None             # of its trainings, instead of what its sections say
    scale: "Scale | None" = None        # a member's own, instead of the one that is asked for
    backbone: str | None = None         # None: whatever the scale has
    published: dict = dataclasses.field(default_factory=dict)      # metric -> figure
    source: str | None = None           # of these

    @property
    def name(self) -> str:
        return self.path.stem

    def at(self, seed: int) -> "Experiment":
        """A single model of it, trained with that seed."""
        training = {**self.sections.get("training", {}), "seed": seed}
        return dataclasses.replace(self, sections={**self.sections, "training": training}, seed=seed, members=(),
                                   mean_of_seeds=())

    def averaged(self) -> list["Experiment"]:
        """Single models: the first is its own, with whose probabilities the others' are averaged."""
        all_of_it = [dataclasses.replace(self, members=(), mean_of_seeds=()), *map(self.beside, self.members)]
        return [one.at(seed) for one in all_of_it for seed in self.mean_of_seeds] or all_of_it

    @property
    def is_mean(self) -> bool:
        return bool(self.members or self.mean_of_seeds)

    def beside(self, member: str) -> "Experiment":
        """Another one of the same folder, `name@scale`: at a scale of its own."""
        name, _, scale = member.partition("@")
        path = _beside(self.path, "members", name)
        scale = read_scale(scale, f"{self.path}: members: {member}") if scale else None
        return dataclasses.replace(read(path), scale=scale)


@dataclasses.dataclass(frozen=True)
class Scale:
    """One YAML of a scale, checked."""
    path: Path
    model: str | list                   # a folder, or the command that makes one; {questions}: stage 2's, for training
    backbone: str                       # what that is
    processes: int                      # of torchrun
    sections: dict

    @property
    def name(self) -> str:
        return self.path.stem


def read(path: Path | str) -> Experiment:
    """Raises UserError, with file and key, if it is no experiment."""
    path = Path(path)
    values = _values(path, ROW, ROW_OPTIONAL, True)
    check = _checker(path, values, True)
    artifacts.dataset_name(str(values["dataset"]), f"{path}: dataset")
    for key in (*ROW, "reference", "backbone", "source"):
        check(isinstance(values.get(key, ""), str), key, "a line of text")
    if "reference" in values:
        _beside(path, "reference", values["reference"])
    group = values.get("group")
    check(group is None or isinstance(group, dict) and len(group) == 1 and all(map(_is_text, *group.items())), "group",
          "one grouping of metrics.json and its group, such as {user activity: inactive}")
    members = values.get("members", [])
    check(isinstance(members, list) and all(map(_is_text, members)), "members", "a list of other experiments' names")
    published = values.get("published", {})
    check(isinstance(published, dict) and all(metric in METRICS and isinstance(figure, float) and 0 <= figure <= 1
                                              for metric, figure in published.items()),
          "published", "a map of metrics to figures such as {Acc@1: 0.3988}")
    check(not published or "source" in values, "source", "where the published figures stand")
    seeds = values.get("mean_of_seeds", [])
    check(isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
          and len(set(seeds)) == len(seeds), "mean_of_seeds", "a list of different seeds")
    sections = {key: values[key] for key in SECTIONS if key in values}
    return Experiment(path, values["table"], values["row"], values["dataset"], sections, values.get("reference"),
                      None if group is None else tuple(next(iter(group.items()))), tuple(members), tuple(seeds),
                      backbone=values.get("backbone"), published=published, source=values.get("source"))


def _beside(path: Path, key: str, name: str) -> Path:
    """The file of another row, which `key` of the row `path` names. Raises UserError if there is none."""
    other = path.parent / f"{name}.yml"
    if not other.is_file():
        raise UserError(f"{path}: {key}: no {other}; write one, or name another row")
    return other


def read_scale(name: str, given: str | None = None) -> Scale:
    """experiments/scales/<name>.yml. given: where it is named, if not by --scale. Raises UserError, with file and key,
    if there is none.
    """
    known = sorted(path.stem for path in SCALES.glob("*.yml"))
    if name not in known:
        raise UserError(f"{given or f'--scale {name[:60]}'}: no {SCALES}/{name[:60]}.yml; write one, or choose among: "
                        f"{', '.join(known) or 'none, so run from the root of the repository'}")
    path = SCALES / f"{name}.yml"
    values = _values(path, (), (LIKE, *SCALE), False)
    other = {}
    if LIKE in values:
        _checker(path, values, False)(values[LIKE] in known, LIKE, f"one of {', '.join(known)}")
        other = _values(SCALES / f"{values[LIKE]}.yml", SCALE, (), False)
    sections, values = merged(other, values), other | values
    check = _checker(path, values, False)
    for key in SCALE:
        check(key in values, key, "it to be there")
    model = values["model"]
    check(_is_text(model) or isinstance(model, list) and len(model) > 0 and all(map(_is_text, model)), "model",
          "a model's folder, or the script that makes one and its flags, as a list of texts")
    check(_is_text(values["backbone"]), "backbone", "a line of text")
    check(type(values["processes"]) is int and values["processes"] > 0, "processes", "a number of processes")
    return Scale(path, model, values["backbone"], values["processes"], sections)


def merged(common: dict, own: dict) -> dict[str, dict]:
    """{section: {flag: value}}: what is `common` to rows or scales, and what one has as its `own`, which counts."""
    return {key: {**common.get(key, {}), **(own.get(key) or {})} for key in SECTIONS}


def chain_of(experiment: Experiment, scale: Scale, raw: Callable | None, work_dir: Path | str, model: str | None = None,
             full_table: bool = False, samples: Step | None = None) -> Step:
    """The last step, the test, of the chain from raw check-ins to metrics; full_table: which others average with.

    raw(data set): (files that its samples are made of, command that makes these first or None). model: the folder of
    the base LLM, instead of the scale's. samples: what leaves the data set's, in place of a step that makes them of
    raw files. Raises UserError if something from outside is missing.
    """
    experiment, *others = experiment.averaged()
    name, root = experiment.dataset, Path(work_dir) / "steps"
    sections = merged(scale.sections, experiment.sections)
    if full_table:
        sections["test"]["full_table"] = True
    gcim, pam = (experiment.sections.get(key) is not False for key in LEFT_OUT)
    similar = "similar" in experiment.sections
    data = f"{name}/preprocessed"

    def step(kind, *command, links=(), reads=()):
        return Step(kind, tuple(command), root, tuple(links), tuple(reads))

    def preprocess(kind, script, *flags, after=(), reads=(), **shown):
        named = shown.pop("named", ("-dataset_name", name))
        return step(kind, "python", f"data-preprocess/{script}", *named, "-datasets", OWN, *flags,
                    links=[(Made(one), ".") for one in after], reads=reads)

    # Raw check-ins to samples, samples to questions.
    if samples is None:
        files, first = raw(name)
        before = [] if first is None else [step("raw", "python", *first, reads=files)]
        samples = preprocess("samples", "run.py", named=("-f", str(artifacts.config_file(name))), after=before,
                             reads=[] if before else files)
    mapping = Made(samples, f"{data}/{artifacts.gps_mapping(name)}")
    known = [samples]
    if similar:
        keys = preprocess("keys", "traj_qk.py", after=[samples])
        known = [preprocess("similar", "traj_sim.py", *_flags("-", sections["similar"]), after=[keys])]
    # Fields that stand for a module go with it; `poi` always shows.
    fields = str(sections["questions"].pop("fields", ",".join(prompts.FIELDS))).split(",")
    fields = ",".join(field for field in fields if gcim or field != "gps" or prompts.MOMENT in fields)
    questions = preprocess("questions", "process_llm_gps.py", "-use_sim", str(similar), *["-use_pam", "True"] * pam,
                           "-fields", fields, *_flags("-", sections["questions"]), after=known)

    if model is None and experiment.backbone not in (None, scale.backbone):
        raise UserError(f"{experiment.path}: is about {experiment.backbone}, and {scale.path} has {scale.backbone}; "
                        "give the folder of that model by --model")
    asked_in_training = Made(questions, f"{data}/{artifacts.questions('train', name, 2, similar, pam)}")
    tables = [_table(other, other.scale or scale) for other in others]      # first: a row may name itself
    averaged = [Made(chain_of(other, other.scale or scale, raw, work_dir, None if other.scale else model,
                              full_table=True), table) for other, table in zip(others, tables)]
    model = _model(model or scale.model, step, scale, asked_in_training)

    def train(kind, script, section, data_path, *flags):
        given = {**sections["training"], **sections[section]}
        earlier = next((flag for flag in ("early_stopping_patience", "load_best_model_at_end") if given.get(flag)), 0)
        if earlier:
            raise UserError(f"{experiment.path}: {earlier}: a row's model is that of its training's last step; leave "
                            "it out, and give the number of steps")
        common = _flags("--", given)
        return step(kind, "torchrun", "--standalone", f"--nproc_per_node={scale.processes}", script,
                    "--model_name_or_path", model, "--data_path", data_path, "--gps_mapping_path", mapping,
                    "--output_dir", OWN, *flags, *common, "--resume_from_checkpoint", "auto")

    # Stage 1 of each module, where it is not left out, stage 2 with both, and the test.
    modules = []
    if gcim:
        asked = preprocess("stage1_questions", "process_projector_gps_stage1.py", "-use_sim", "False",
                           *_flags("-", sections["stage_1_questions"]), after=[samples])
        trained = train("gcim", "finetune_GCIM.py", "gcim",
                        Made(asked, f"{data}/{artifacts.questions('train', name, 1, False)}"))
        modules += ["--geoencoder_path", Made(trained, artifacts.FINAL_ENCODER)]
    if pam:
        vectors = _embeddings(preprocess, sections["embeddings"], samples, experiment)
        embedding = Made(vectors, f"{data}/{artifacts.poi_embeddings(name)}")
        asked = preprocess("pam_questions", "process_pam_stage1.py", *_flags("-", sections["pam_questions"]),
                           after=[samples])
        trained = train("pam", "finetune_PAM.py", "pam", Made(asked, f"{data}/{artifacts.alignment_questions(name)}"),
                        "--poi_embedding_path", embedding)
        modules += ["--projector_path", Made(trained, artifacts.FINAL_PROJECTOR), "--poi_embedding_path", embedding]
    stage_2 = sections["stage_2"]
    if not (modules or stage_2.get("geo_encoder")):
        for section, flag in (("stage_2", "train_encoders"), ("stage_2", "encode_each"), ("training", "encode_each")):
            sections[section].pop(flag, None)
    tuned = train("stage2", "finetune_LLM_with_GCIM.py", "stage_2", asked_in_training, *modules)
    if stage_2.get("train_encoders"):       # they have changed since stage 1, or began in stage 2
        own = {"--geoencoder_path": artifacts.FINAL_ENCODER, "--projector_path": artifacts.FINAL_PROJECTOR}
        modules = [Made(tuned, own[flag]) if flag in own else part for flag, part in zip([None, *modules], modules)]
        if stage_2.get("geo_encoder") and not stage_2.get("geo_output"):
            modules += ["--geoencoder_path", Made(tuned, artifacts.FINAL_ENCODER)]
    return step("test", "python", "test_next_gps.py", "--base_model", model, "--output_dir", f"{OWN}/{CHECKPOINT}",
                "--data_path", Made(questions), "--dataset_name", name,
                "--test_file", artifacts.questions("test", name, 2, similar, pam), "--test_type", "llm",
                "--gps_mapping_path", mapping, *modules, *_flags("--", sections["test"]),
                *["--average_with"] * bool(averaged), *averaged,
                links=[(Made(tuned, LAST_CHECKPOINT), CHECKPOINT)])


def _table(member: Experiment, scale: Scale) -> str:
    """Where its test leaves the table of its own probabilities. Raises UserError for a mean."""
    if member.members:
        raise UserError(f"{member.path}: others are averaged with a model's own probabilities; leave members out, or "
                        "name another member")
    flags = merged(scale.sections, member.sections)["test"]
    return str(Path(CHECKPOINT, artifacts.results(flags), artifacts.LOG_PROBABILITIES))


CHECKPOINT = "checkpoint"       # the test's own links to stage 2's last checkpoint, beside which its results lie


def write_link(experiment: Experiment, scale: Scale, test: Step, work_dir: Path | str, model: str | None) -> Path:
    """<work_dir>/<scale>/<experiment>[.<seed>].json: which metrics.json is this row's, for results.py."""
    found = sorted(test.out.rglob(artifacts.METRICS))
    if len(found) != 1:
        raise UserError(f"{test.out}: holds {len(found)} {artifacts.METRICS}, not one; move {test.folder} away, and "
                        "the test runs again")
    seeded = experiment.seed is not None
    path = Path(work_dir) / scale.name / f"{experiment.name}{f'.{experiment.seed}' * seeded}.json"
    command = ["python", "run_experiment.py", str(experiment.path), "--scale", scale.name,
               *["--seeds", str(experiment.seed)] * seeded, *(["--model", model] if model else [])]
    written = {"experiment": experiment.name, "seed": experiment.seed, "scale": scale.name,
               "table": experiment.table, "row": experiment.row,
               "dataset": experiment.dataset, "reference": experiment.reference, "group": experiment.group,
               "model": model or scale.backbone, "published": experiment.published, "source": experiment.source,
               "metrics": str(found[0].relative_to(work_dir)), "step": test.id, "command": shlex.join(command),
               "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    with writing.atomic_write(path) as file:
        json.dump(written, file, indent=1)
    return path


def _model(model: str | list, step: Callable, scale: Scale, questions: Made) -> str | Made:
    if isinstance(model, list):
        parts = [questions if part == "{questions}" else part for part in model]
        return Made(step("model", "python", *parts, "--output_dir", f"{OWN}/model"), "model")
    if not (Path(model) / "config.json").is_file():
        raise UserError(f"{model}: no folder of a model ({scale.path} or --model); give the folder of {scale.backbone} "
                        "by --model")
    return model


def _embeddings(preprocess: Callable, flags: dict, samples: Step, experiment: Experiment) -> Step:
    """The vectors of the data set's transitions, or of another model, whose file the row names (`from`)."""
    if "from" in flags and not Path(flags["from"]).is_file():
        raise UserError(f"{flags['from']}: not found; {experiment.path} takes the POI embeddings of another model from "
                        "there, a row for each encoded POI id and 128 wide; train it and put them there")
    return preprocess("embeddings", "poi_embeddings.py", *_flags("-", flags), after=[samples])


def _flags(dash: str, values: dict) -> list[str]:
    return [text for flag, value in values.items() for text in (f"{dash}{flag}", str(value))]


def _values(path: Path, needed: tuple, optional: tuple, row: bool) -> dict:
    """The map in a YAML. Raises UserError if it is none, or has unknown keys, lacks some, or no sections of flags."""
    if not path.is_file():
        raise UserError(f"{path}: not found; give a file of {FOLDER}/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}; {EXPLAINED[row]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of `key: value`; {EXPLAINED[row]}")
    allowed = (*needed, *optional, *SECTIONS)
    for key in values:
        if key not in allowed:
            raise UserError(f"{path}: unknown key {str(key)[:60]}; it takes {', '.join(allowed)}")
    check = _checker(path, values, row)
    for key in needed:
        check(key in values, key, "it to be there")
    for key in SECTIONS:
        value = values.get(key, {})
        check(value is False and key in LEFT_OUT and row or isinstance(value, dict)
              and all(_is_text(flag) and isinstance(given, (str, int, float)) for flag, given in value.items()), key,
              "a map of flags to values" + ", or false" * (row and key in LEFT_OUT))
    return values


def _checker(path: Path, values: dict, row: bool) -> Callable:
    def check(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise UserError(f"{path}: {key}: expected {expected}, got {str(values.get(key))[:60]!r}; {EXPLAINED[row]}")
    return check


def _is_text(value) -> bool:
    return isinstance(value, str) and value.isprintable() and value != ""
