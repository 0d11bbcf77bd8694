"""What the Hugging Face hub reads of a model card, the YAML in front, and what the base says of its licence.

Written by huggingface_hub's own classes, as its documentation of model cards has it
(https://huggingface.co/docs/hub/model-cards).
"""
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData, hf_hub_download, metadata_load

from ga_llm.base.reading import read_json

log = logging.getLogger(__name__)

NAME = re.compile(r"[\w.-]+/[\w.-]+")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]+")      # as huggingface_hub lays out its cache
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")       # the hub's identifiers: apache-2.0, llama3.2
LICENCE_KEYS = ("license", "license_name", "license_link")
TYPES = {"Acc@1": "accuracy", "Acc@5": "accuracy", "MRR": "mrr"}


def name_on_hub(base: str) -> str | None:
    """ORG/NAME of a base model: of its name, or of its folder in the hub's cache; None of another folder."""
    if Path(base).is_dir():
        found = CACHED.search(str(Path(base).resolve()))
        return "/".join(found.groups()) if found else None
    return base if NAME.fullmatch(base) else None


def licence(base: str, cache_dir: str | None = None) -> dict[str, str]:
    """`LICENCE_KEYS` of a base model as its card's YAML tells them, else its config.json; {} where neither does.

    base: a folder, or a name on the hub, which is asked where it can be reached. A `license_link` to a file of the
    base's becomes one to the hub, or falls away.
    """
    card, config = (_file(base, file, cache_dir) for file in ("README.md", "config.json"))
    told = {}
    for path, read in ((card, metadata_load), (config, read_json)):
        try:
            told = path and read(path) or {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            log.info("%s: not read for the base's licence (%s)", path, " ".join(str(error).split())[:200])
        if isinstance(told.get("license"), str) and LICENCE.fullmatch(told["license"].lower()):
            break
    else:
        return {}
    found = {key: told[key] for key in LICENCE_KEYS if isinstance(told.get(key), str)}
    found["license"] = found["license"].lower()
    link = found.pop("license_link", "")
    if re.fullmatch(r"https?://\S+", link):
        found["license_link"] = link
    elif name_on_hub(base) and re.fullmatch(r"[\w.-]+", link):
        found["license_link"] = f"https://huggingface.co/{name_on_hub(base)}/blob/main/{link}"
    return found


def _file(base: str, file: str, cache_dir: str | None) -> Path | None:
    """A file of the base model; None where it has none, or the hub cannot be reached."""
    if Path(base).is_dir():
        path = Path(base) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(base, file, cache_dir=cache_dir))
    except (OSError, ValueError):       # all of huggingface_hub's errors are of these
        return None


def front(name: str, base: str | None, licence_keys: dict[str, str], results: list[EvalResult]) -> str:
    """The YAML of a card, without the lines that enclose it. base: `name_on_hub`; results: `results`."""
    of_base = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    data = ModelCardData(**of_base, library_name="transformers", pipeline_tag="text-generation", model_name=name,
                         tags=["next-poi-recommendation", "geography", "ga-llm"], eval_results=results or None,
                         **licence_keys)
    if not results:
        data.pop("model_name")
    return data.to_yaml()


def results(parts: dict[str, dict], dataset: str, places: int, baselines: Sequence[str]) -> list[EvalResult]:
    """`TYPES` over all pairs, with the figures of those baselines that there are beside each in its name.

    parts: {how the model answered: the metrics.json of that}; places: how many the data set has.
    """
    found = []
    for how, metrics in parts.items():
        summary = metrics["all"]["model"]
        for metric in filter(summary.__contains__, TYPES):
            others = [f"{name}: {metrics['all'][name][metric]['value']:.4f}" for name in baselines
                      if metric in metrics["all"].get(name, {})]
            beside = f" ({', '.join(others)})" if others else ""
            found.append(EvalResult(
                task_type="text-generation",
                task_name=f"next-POI recommendation, protocol {metrics.get('protocol')}, decoding "
                          f"{metrics.get('decoding')}, n = {summary['n']:,}",
                dataset_type=dataset, dataset_name=f"{dataset} ({places:,} POIs)", dataset_split=metrics.get("split"),
                metric_type=TYPES[metric], metric_name=f"{metric}{how}{beside}",
                metric_value=round(summary[metric]["value"], 4)))
    return found
