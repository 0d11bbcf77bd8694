"""The name of every file that passes from one script to another, and the command that makes it.

No torch here: the preprocessing scripts use this module too.
"""
import dataclasses
import re
from pathlib import Path

from ga_llm.base.cli import UserError

DATASETS = Path("datasets")
CONFIGS = Path("best_conf")
NAME = re.compile(r"\w[\w.-]{0,99}")     # of a data set: no path, and not too long for the names of its files

SPLITS = ("train", "validate", "test")
SAMPLE = "sample.csv"
LABEL_ENCODING = "label_encoding.json"
STATS = "stats.json"
POINTER_ALONE = "pointer_alone.json"     # beside the samples: what this baseline says of their pairs
GPS_COLUMNS = ["GPS_id", "Latitude", "Longitude"]    # of the GPS mapping; GPS_id is the encoded POI id
NAME_COLUMNS = ["poi", "name"]      # of the places' names; poi is the raw id, which another encoding leaves as it is

MERGED_ENCODER = "geo_encoder_merged.pth"
FINAL_ENCODER = "geo_encoder_final_merged.pth"
PROJECTOR = "poi_projector.pth"
FINAL_PROJECTOR = "poi_projector_final.pth"
TRAINABLE_PARAMS = "trainable_params.safetensors"
POINTER = "pointer.safetensors"     # beside an exported model
LLM_ALONE = "llm_alone"             # results of a model with a pointer, without it
TRAINER_LOG = "trainer_log.jsonl"
LOSS_PICTURE = "loss.png"
RUN = "run.json"
METRICS = "metrics.json"
USER_HISTORY = "user-history frequency"       # in it, the baseline without which no result is shown
PREDICTIONS = "predictions.jsonl"
LOG_PROBABILITIES = "log_probabilities.npy"
REPORT = "report.html"
EXPLORER = "explorer.html"
REPORT_PICTURES = "report_*.png"    # beside it


@dataclasses.dataclass(frozen=True)
class EncoderFiles:
    """What is kept of a module: N/`merged` at checkpoint N, `final` at the end, `config` beside each; what makes it.

    flag: which later steps take it by.
    """
    module: str
    merged: str
    final: str
    config: str
    made_by: str
    flag: str


GCIM = EncoderFiles("GCIM", MERGED_ENCODER, FINAL_ENCODER, "geo_encoder_config.json",
                    "torchrun … finetune_GCIM.py (stage 1)", "geoencoder_path")
PAM = EncoderFiles("PAM", PROJECTOR, FINAL_PROJECTOR, "poi_projector_config.json",
                   "torchrun … finetune_PAM.py (stage 1)", "projector_path")


def dataset_name(text: str, where: str = "-dataset_name") -> str:
    """Return `text` if it can name a data set, whose files then lie in best_conf/ and datasets/, never elsewhere.

    Raises UserError, which begins with `where`, if it cannot.
    """
    if not NAME.fullmatch(text):
        raise UserError(f"{where} {text[:60]!r}: no name for a data set; give at most 100 letters, digits, _, - and ., "
                        "the first a letter, digit or _")
    return text


def config_file(dataset: str) -> Path:
    """`best_conf/<dataset>.yml`: a data set is known if it has one."""
    path = CONFIGS / f"{dataset_name(dataset)}.yml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yml"))) or "none: run from the repository's root"
        raise UserError(f"-dataset_name {dataset}: no {path}; write one, or choose among: {known}")
    return path


def preprocessed(dataset: str, root: Path | str = DATASETS) -> Path:
    """The folder of one data set's samples, mapping and questions."""
    return Path(root) / dataset_name(dataset) / "preprocessed"


def split_sample(split: str) -> str:
    return f"{split}_sample.csv"


def gps_mapping(dataset: str) -> str:
    return f"{dataset}_gps_mapping.csv"


def poi_names(dataset: str) -> str:
    """The places' own names, where the raw data or the user has them; beside the GPS mapping."""
    return f"{dataset}_poi_names.csv"


def dataset_of(mapping: Path | str) -> tuple[str, Path] | None:
    """(data set, root of the data sets) whose GPS mapping lies at `mapping`; None if it lies elsewhere."""
    path = Path(mapping)
    name, root = path.parent.parent.name, path.parent.parent.parent
    is_one = NAME.fullmatch(name) and path == preprocessed(name, root) / gps_mapping(name)
    return (name, root) if is_one else None


def key_query_pairs(split: str) -> str:
    return f"{split}_kq_pairs.json"


def similar_trajectories(split: str) -> str:
    return f"{split}_key_top200.json"


POI_WIDTH = 128     # of a POI's embedding (paper, Section 3.3)


def poi_embeddings(dataset: str) -> str:
    """POI-to-POI transitions as vectors: row n is POI n's."""
    return f"{dataset}_poi_embeddings.npy"


def embedding_settings(path: Path | str) -> Path:
    """Beside POI embeddings: what they were made of."""
    return Path(path).with_suffix(".json")


def alignment_questions(dataset: str) -> str:
    """Questions of PAM's stage 1."""
    return f"train_qa_pairs_{dataset}_pam.json"


def question_settings(path: Path | str) -> Path:
    """Beside a question file: what its prompts show, for whoever asks a trained model more of them."""
    return Path(path).with_suffix(".settings.json")


def check_ins(path: Path | str) -> Path:
    """Beside a question file: time, place and category of every check-in that its prompts show (`pairs.check_ins`)."""
    return Path(path).with_suffix(".check_ins.safetensors")


def questions(split: str, dataset: str, stage: int, use_sim: bool, use_pam: bool = False) -> str:
    """Question file of `split` ("train" or "test") for stage 1 (GCIM) or stage 2 (LLM; `use_pam`: with `<POI n>`)."""
    sim = "with_sim" if use_sim else "without_sim"
    tail = f"projector_gps_{sim}_stage1" if stage == 1 else f"llm_{sim}_gps" + "_pam" * use_pam
    return f"{split}_qa_pairs_kqt_200items_{dataset}_{tail}.{'json' if split == 'train' else 'txt'}"


def questions_command(dataset: str, use_sim: bool = False, use_pam: bool = False) -> str:
    """What makes stage 2's question files."""
    return (f"python data-preprocess/process_llm_gps.py -dataset_name {dataset} -use_sim {use_sim}"
            + " -use_pam True" * use_pam)


def require(path: Path | str, made_by: str) -> Path:
    """Return `path`; if it is missing or empty, raise an error that names the command which makes it."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: not found; make it with `{made_by}`")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path}: empty; make it again with `{made_by}`")
    return path


def results(test: dict) -> str:
    """The subfolder of a checkpoint for results with these flags of test_next_gps.py.

    Only the trained model's ranking of all test pairs lies beside the checkpoint itself (""): no other may replace it.
    """
    named = [test[flag] for flag, default in (("split", "test"), ("test_type", "llm"), ("decoding", "rank"),
                                              ("protocol", "ga-llm")) if test.get(flag, default) != default]
    others = test.get("average_with")
    return "_".join([*named, *[LLM_ALONE] * (not test.get("pointer", True)),
                     *(flag for flag in ("always_end", "released_prompt", "base_norms") if test.get(flag)),
                     *[f"average{1 + len(others or ())}"] * bool(others),
                     *(f"{flag}{test[flag]}" for flag in ("limit", "draw") if test.get(flag))])


def split_of(path: Path | str, dataset: str) -> str:
    """Which split's questions a file holds, by its name; of another name, that without its ending."""
    name = Path(path).name
    split = name.partition("_qa_pairs_")[0]
    return split if split in SPLITS and f"_{dataset}_" in name else Path(name).stem
