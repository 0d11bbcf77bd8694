"""What the hub reads of a card: by huggingface_hub's own validation, which raises for a card that it cannot parse."""
import dataclasses
import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import validate_repo_id

from ga_llm.serving import hub, model_card
from ga_llm.serving.model_card import BASELINES as NAMES

BASELINES = tuple(NAMES)
MODEL = model_card.Model(
    folder=Path("E"), base="org/base", base_on_hub="org/base", licence={"license": "apache-2.0"}, dataset="nyc",
    raw_from="somewhere", context=4096, dtype="bfloat16", full=False, trained=[], quantization="none", rounded=False,
    questions={"fields": ["poi", "gps"], "use_sim": False, "max_history": 10}, flags=None, step=7, processes=1,
    metrics=None, encoders=["GCIM"], places=4980, first=1, last=3, latitude=40.0, longitude=-74.0,
    counts={"train": {"users": 1047, "check_ins": 83449}, "test": {"users": 436, "check_ins": 9074}})


def metrics(value, names=("Acc@1", "Acc@5", "MRR"), baselines=BASELINES[:1], **more):
    def summary(value):
        return {"n": 1447} | {name: {"value": value, "low": value - .1, "high": value + .1} for name in names}
    return {"protocol": "llm4poi", "decoding": "rank", "split": "test", **more,
            "all": {"model": summary(value), **{name: summary(.2267) for name in baselines}}}


def read(**changes) -> huggingface_hub.ModelCardData:
    """The YAML of a card, as the hub's client validates it."""
    text = model_card.card(dataclasses.replace(MODEL, **changes))
    found = huggingface_hub.ModelCard(text)
    assert str(found) == text       # read and written again, nothing is lost
    assert found.data.pipeline_tag == "text-generation" and "next-poi-recommendation" in found.data.tags
    return found.data


def test_without_an_evaluation():
    data = read()
    validate_repo_id(data.base_model)
    assert (data.base_model, data.base_model_relation, data.license) == ("org/base", "finetune", "apache-2.0")
    assert data.eval_results is None and "model-index" not in data.to_dict()


def test_metrics_stand_beside_the_baseline():
    data = read(metrics=metrics(.39876))
    assert data.model_name == "E"
    assert [(found.metric_type, found.metric_name, found.metric_value) for found in data.eval_results] == [
        ("accuracy", "Acc@1 (user-history frequency: 0.2267)", .3988),
        ("accuracy", "Acc@5 (user-history frequency: 0.2267)", .3988),
        ("mrr", "MRR (user-history frequency: 0.2267)", .3988)]
    first = data.eval_results[0]
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == ("nyc", "nyc (4,980 POIs)", "test")
    assert first.task_name == "next-POI recommendation, protocol llm4poi, decoding rank, n = 1,447"


def test_the_pointer_alone_stands_there_where_it_has_been_trained():
    both = metrics(.39876, baselines=BASELINES)
    assert read(metrics=both).eval_results[0].metric_name == (
        f"Acc@1 (user-history frequency: 0.2267, {BASELINES[1]}: 0.2267)")
    card = model_card.card(dataclasses.replace(MODEL, metrics=both))
    assert f"| {BASELINES[1]} | 0.2267 [0.1267, 0.3267] |" in card
    assert "that of the pointer alone overlap: that it is better is not shown" in card
    assert BASELINES[1] not in model_card.card(dataclasses.replace(MODEL, metrics=metrics(.4)))


def test_of_one_sampled_answer():
    """metrics.json has no other metric of the model then, and one of an earlier version no split."""
    found = metrics(.25, names=("Acc@1",), decoding="sample")
    del found["split"]
    result, = read(metrics=found).eval_results
    assert (result.metric_name, result.dataset_split) == ("Acc@1 (user-history frequency: 0.2267)", None)


def test_with_a_pointer_both_models_are_told_apart():
    names = {found.metric_name: found.metric_value for found in read(
        pointer=True, metrics=metrics(.4), alone=metrics(.3)).eval_results}
    assert names["Acc@1, with the pointer (user-history frequency: 0.2267)"] == .4
    assert names["Acc@1, the LLM alone (user-history frequency: 0.2267)"] == .3 and len(names) == 6


def test_a_mixture_is_told():
    settings = {"test_file": "test_qa.txt", "average_with": "['A.npy']"}
    mixed = metrics(.4, settings=settings)
    assert read(metrics=mixed).eval_results[0].metric_name.startswith("Acc@1, --average_with ['A.npy'] (")
    assert "before merging, --average_with ['A.npy']." in " ".join(model_card.card(dataclasses.replace(
        MODEL, metrics=mixed)).split())
    settings["average_with"] = "[]"
    assert read(metrics=mixed).eval_results[0].metric_name.startswith("Acc@1 (")


def test_a_base_that_no_hub_has():
    """A folder's name could be another's model there."""
    data = read(base="tiny", base_on_hub=None, licence={})
    assert data.base_model is None and data.license is None and "base_model_relation" not in data
    text = " ".join(model_card.card(dataclasses.replace(MODEL, base="tiny", base_on_hub=None, licence={})).split())
    assert "tiny, trained to predict" in text and "this card has no `license` field: add it" in text


def test_the_data_sets_counts():
    assert "| split | users | check-ins |\n|---|---|---|\n| train | 1,047 | 83,449 |\n| test | 436 | 9,074 |\n" in (
        model_card.card(MODEL))
    assert "| split |" not in model_card.card(dataclasses.replace(MODEL, counts={}))


# The base's licence.

LINK = {"license": "other", "license_name": "own", "license_link": "https://a.b/c"}


@pytest.mark.parametrize("card, config, found", [
    (None, {}, {}), (None, {"license": "mit"}, {"license": "mit"}),
    ("---\nlicense: llama2\n---\n# A", {"license": "mit"}, {"license": "llama2"}),
    ("---\nlicense: Apache-2.0\ntags: [a]\n---\n", {}, {"license": "apache-2.0"}),
    ("---\nlicense: other\nlicense_name: own\nlicense_link: https://a.b/c\n---\n", {}, LINK),
    ("---\nlicense: other\nlicense_name: own\nlicense_link: ../../LICENSE\n---\n", {},
     {"license": "other", "license_name": "own"}),
    ("---\nlicense: [mit, gpl]\n---\n", {}, {}), ("---\nlicense: What Meta says\n---\n", {}, {}),
    ("# No YAML", {}, {}), ("---\nlicense: {\n---\n", {"license": "mit"}, {"license": "mit"}),
    ("---\n- a\n---\n", {}, {}), (b"---\nlicense: \xff\n---\n", {}, {})],
    ids=["nothing", "config", "card first", "case", "other", "link of a file", "list", "free text", "no YAML",
         "broken YAML", "no keys", "no text"])
def test_licences(tmp_path, card, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if card is not None:
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert hub.licence(str(tmp_path)) == found
    assert read(licence=found).get("license") == found.get("license")


def test_a_base_of_the_hub(tmp_path, monkeypatch):
    """Its card is asked for there; what cannot be reached tells nothing. In the cache's folder the name is told."""
    snapshot = tmp_path / "models--org--the-base" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE.txt\n---\n")
    assert hub.name_on_hub(str(snapshot)) == "org/the-base"
    expected = {"license": "other", "license_name": "own",
                "license_link": "https://huggingface.co/org/the-base/blob/main/LICENSE.txt"}
    assert hub.licence(str(snapshot)) == expected

    def download(name, file, cache_dir):
        assert name == "org/the-base" and cache_dir == "cache"
        if file not in ("README.md",):
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        return str(snapshot / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert hub.licence("org/the-base", "cache") == expected
    (snapshot / "README.md").unlink()
    assert hub.licence("org/the-base", "cache") == {}


def test_rows_that_were_trained_as_sums_are_told():
    of_cells = dataclasses.replace(MODEL, encoders=[], flags={"geo_output": True, "geo_encoder": "cells",
                                                              "batch_tokens": 4096, "per_device_train_batch_size": 1})
    text = " ".join(model_card.card(of_cells).split())
    assert "sums of its own row, its category's and the cells encoder's" in text and "No encoder's" not in text
    assert "batch_tokens 4096" in text and "per_device_train_batch_size" not in text


def test_the_next_command_finds_the_data_sets():
    model = dataclasses.replace(MODEL, pointer=True)
    assert "--model E --data_path datasets/x --check_ins" in model_card.how_to_use(model, "E", "datasets/x")
    assert "--model E --check_ins" in model_card.how_to_use(model, "E", "datasets")
