"""export.py: what stock transformers reproduces, what the folder holds, and what is refused."""
import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import stock
import torch
from commands import EMBEDDINGS, MAPPING
from harness import call, refusal
from peft import PeftModel
from safetensors.torch import load_file

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.llm import backbone
from ga_llm.serving import export
from geo_encoder import alignment, gps_tokens, injection
from geo_encoder.encoder import GeoEncoderConfig, build_encoder

GEO = "outputs/gcim/6/geo_encoder_merged.pth"
CHECKPOINT = "outputs/llm/checkpoint-6"
EXPORT = ["export.py", "--base_model", "models/tiny", "--output_dir", CHECKPOINT, "--dataset_name", "sample",
          "--context_size", "4096", "--geoencoder_path", GEO, "--gps_mapping_path", MAPPING]
TEXT = "<question>: POI id 12 <POI 12> <GPS 5>, then POI id 5 <POI 5> <GPS 12>. <answer>: POI id 7."


def a_trained_model(base, mapping, modules, lora):
    """A model with vectors injected, and LoRA that does something."""
    torch.manual_seed(0)
    tokenizer, model = backbone.load_tokenizer(base), backbone.load_llm(base, 1024, "sdpa", torch.float32)
    gps, poi = (add(tokenizer, mapping, model) for add in (gps_tokens.add_gps_tokens, gps_tokens.add_poi_tokens))
    if "GCIM" in modules:
        geo = build_encoder(GeoEncoderConfig(model.config.hidden_size)).eval()
        injection.attach_table(model, injection.gps_injection(geo, 25, mapping, gps))
    if "PAM" in modules:
        vectors = np.random.default_rng(0).normal(size=(len(mapping.ids), artifacts.POI_WIDTH)).astype(np.float32)
        projector = alignment.build_projector(model.config.hidden_size)
        injection.attach_table(model, injection.poi_injection(projector, alignment.POIEmbeddings(vectors, ""), poi))
    if lora:
        model = backbone.add_lora(model, 4, 8, 0.0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return tokenizer, model.eval()


def test_stock_transformers_reproduces_the_logits(tiny_llama, mapping_csv, tmp_path):
    """Of tied and untied models, with LoRA and trained in full, with either module and both; positions scaled."""
    mapping, expected, folders = gps_tokens.read_gps_mapping(mapping_csv), [], []
    for tied, modules, lora in ((False, "GCIM", True), (False, "GCIM PAM", False), (True, "PAM", True),
                                (True, "GCIM PAM", True), (True, "GCIM", False)):
        base = tiny_llama(tie_embeddings=tied, max_position=512)
        tokenizer, model = a_trained_model(base, mapping, modules, lora)
        assert isinstance(model, PeftModel) == lora and model.config.tie_word_embeddings == tied
        with torch.no_grad():
            expected.append(model(**tokenizer([TEXT], return_tensors="pt")).logits)
        folders.append(tmp_path / f"{tied} {modules} {lora}")
        with export.new_folder(folders[-1]) as folder:
            export.save(export.plain(model, torch.float32), tokenizer, 1024, folder)
        config = json.loads((folders[-1] / "config.json").read_text())
        assert config["rope_parameters"]["factor"] == 2.0 and not config["tie_word_embeddings"]
    found = stock.read(TEXT, folders, tmp_path / "found.pt")
    for folder, before in zip(folders, expected, strict=True):
        after = found[str(folder)]["logits"]
        assert before.abs().max() > 0.1 and (before - after).abs().max() < 1e-4, folder


@pytest.fixture(scope="module")
def exported(repo):
    result = call(repo, *EXPORT, "--dtype", "float32", "--export_dir", "outputs/for_export")
    assert result.code == 0 and "vllm serve outputs/for_export --max-model-len 4096" in result.out, result.err
    return repo / "outputs/for_export"


def test_what_an_export_holds(repo, exported):
    assert {"README.md", "config.json", "ga_llm.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json"} == {path.name for path in exported.iterdir()}
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1
    told = "".join((exported / name).read_text() for name in ("config.json", "tokenizer_config.json", "README.md",
                                                              "ga_llm.json", "generation_config.json"))
    assert not [word for word in (str(repo), "/tmp", "quantization_config", "adapter", "attn_impl", "_name_or_path")
                if word in told]
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "`<GPS n>`" in card and "max_steps 6" in card
    assert "tiny, trained" in card and "| split | users | pois |" in card and "has no `license` field" in card
    asked = json.loads((exported / "ga_llm.json").read_text())["questions"]
    assert asked["max_history"] == 10 and "gps" in asked["fields"]


def test_the_card_tells_the_metrics_beside_the_baseline(repo, tmp_path):
    checkpoint = shutil.copytree(repo / CHECKPOINT, tmp_path / "checkpoint-6")

    def summary(value):
        return {"n": 40} | dict.fromkeys(("Acc@1", "Acc@5", "MRR"), {"value": value, "low": value - 0.1,
                                                                     "high": value + 0.1})
    (checkpoint / "metrics.json").write_text(json.dumps(
        {"protocol": "ga-llm", "decoding": "rank", "all": {"model": summary(.2),
                                                                "user-history frequency": summary(.5)}}))
    result = call(repo, *EXPORT, "--output_dir", checkpoint, "--export_dir", tmp_path / "exported")
    assert result.code == 0, result.err
    card = (tmp_path / "exported/README.md").read_text()
    assert "n = 40 (protocol ga-llm, decoding rank)" in card and "| model | 0.2000 [0.1000, 0.3000] |" in card
    assert "| user-history frequency | 0.5000 [0.4000, 0.6000] |" in card and "worse than the count" in card
    assert "merged into these weights; the rest is rounding" in card
    found = huggingface_hub.ModelCard(card).data.eval_results
    assert [(result.metric_name, result.metric_value) for result in found] == [
        (f"{name} (user-history frequency: 0.5000)", .2) for name in ("Acc@1", "Acc@5", "MRR")]


def test_bfloat16_of_converted_weights(repo, exported, tmp_path):
    """What zero_to_fp32.py makes is exported like the checkpoint, and a cast is all that --dtype does."""
    checkpoint = shutil.copytree(repo / CHECKPOINT, tmp_path / "checkpoint-6")
    state = {**load_file(checkpoint / "adapter_model.safetensors"),
             **load_file(checkpoint / "trainable_params.safetensors")}
    torch.save(state, checkpoint / "pytorch_model.bin")
    (checkpoint / "trainable_params.safetensors").unlink()
    result = call(repo, *EXPORT, "--output_dir", checkpoint, "--dtype", "bfloat16", "--gguf", "f16", "--export_dir",
                  tmp_path / "half")
    assert result.code == 0, result.err
    whole, half = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "half"))
    assert whole.keys() == half.keys() and "lm_head.weight" in whole
    assert all(torch.equal(tensor.bfloat16(), half[name]) for name, tensor in whole.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "half/model-f16.gguf").stat().st_mode == (tmp_path / "half/config.json").stat().st_mode
    card = (tmp_path / "half/README.md").read_text()
    assert "`model-f16.gguf` is the same model" in card and "Not by text" not in card


def test_whole_or_not_at_all(tmp_path):
    for left in ("of a killed run", "."):
        hidden = tmp_path / ".new.unfinished"
        hidden.mkdir()
        (hidden / left.replace(".", "model")).write_text("half")
        with pytest.raises(OSError, match="full"):
            with export.new_folder(tmp_path / "new") as folder:
                assert list(folder.iterdir()) == []
                (folder / "config.json").write_text("{}")
                raise OSError("full")
        assert list(tmp_path.iterdir()) == []
    with export.new_folder(tmp_path / "new") as folder:
        (folder / "config.json").write_text("{}")
        with pytest.raises(UserError, match="another run"):
            with export.new_folder(tmp_path / "new"):
                pass
        assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "config.json"]


NEW = ["--export_dir", "outputs/refused_export"]


@pytest.mark.parametrize("flags, names", [
    ([], ["--export_dir is required"]),
    (["--export_dir", "outputs/gcim"], ["outputs/gcim", "exists"]),
    ([*NEW, "--geoencoder_path", ""], ["trained with GCIM", "--geoencoder_path"]),
    ([*NEW, "--projector_path", "p.pth"], ["p.pth", "not found"]),
    ([*NEW, "--projector_path", GEO], ["--projector_path", "--poi_embedding_path"]),
    ([*NEW, "--poi_embedding_path", EMBEDDINGS], ["--projector_path"]),
    ([*NEW, "--output_dir", "outputs/llm"], ["outputs/llm"]),
    ([*NEW, "--context_size", "64000"], ["--context_size 4096"]),
    ([*NEW, "--base_model", "./models/nowhere"], ["./models/nowhere"]),
    ([*NEW, "--dataset_name", "atlantis"], ["atlantis"]),
    ([*NEW, "--questions", "none.json"], ["none.json"]),
    ([*NEW, "--questions", f"{CHECKPOINT}/trainer_state.json"], ["trainer_state.json", "--questions"])],
    ids=["no folder", "there already", "no encoder", "no projector", "a projector alone", "half of PAM",
         "no checkpoint", "another length", "no base", "no data set", "no settings", "other settings"])
def test_exports_that_are_refused(repo, flags, names):
    refusal(call(repo, *EXPORT, *flags), *names)
    assert not list((repo / "outputs").glob("*refused_export*"))
