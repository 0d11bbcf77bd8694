"""From training to evaluation and export, a base in 4 bits stays what it was; and what a checkpoint says of itself."""
import re
from pathlib import Path

import pytest
import torch
from commands import FLAGS, README_FLAGS
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune_LLM_with_GCIM as stage_2
from ga_llm.base import writing
from ga_llm.base.cli import Parser
from ga_llm.evaluation import trained
from ga_llm.llm import backbone, four_bits
from ga_llm.serving import export
from ga_llm.training import arguments, checkpoint_card, checkpoints, common, resuming, trainers
from geo_encoder import gps_tokens, injection

CHECKPOINT = "outputs/llm/checkpoint-6"
TEXT = "<question>: user 1 POI id 3 <GPS 3>. Where next? <answer>:"


@pytest.fixture
def logits(repo, monkeypatch, tmp_path):
    """logits(kind): of one prompt, by the model as it was trained, evaluated, or exported."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(repo)

    def of(model, tokenizer):
        with torch.no_grad():
            return model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits

    def as_trained():
        args = arguments.parse(stage_2.Stage2Arguments, [*README_FLAGS, "--output_dir", str(tmp_path / "O"), *FLAGS[2],
                                                         "--bf16", "False", "--use_full_attn", "True",
                                                         "--init_from", CHECKPOINT])
        setup = common.set_up(args)
        writing._held.close()
        model = backbone.add_lora(setup.model, args.lora_r, args.lora_alpha, args.lora_dropout)
        backbone.train_by_name(model, args.trainable_params)
        found = injection.attach_encoders(setup.model, injection.load_encoders(
            setup.model, setup.mapping, setup.token_ids, args.geoencoder_path))
        trainer = trainers.GATrainer(model=model, args=args, train_dataset=setup.train_dataset, encoders=found,
                                     data_collator=setup.collator, processing_class=setup.tokenizer)
        resuming.start_from(Path(CHECKPOINT), trainer)
        return of(model, setup.tokenizer)

    def loaded(*flags, **options):
        parser = Parser("")
        trained.add_flags(parser)
        args = parser.parse_args(["--output_dir", CHECKPOINT, "--dtype", "float32", *flags])
        agreement = trained.fill_in(args)
        mapping = gps_tokens.read_gps_mapping(args.gps_mapping_path)
        return trained.load(args, agreement, mapping, "sdpa", **options)

    def exported():
        model, tokenizer = loaded(to_merge=True)
        with export.new_folder(tmp_path / "E") as folder:
            export.save(export.plain(model, torch.float32), tokenizer, 4096, folder)
        return of(AutoModelForCausalLM.from_pretrained(tmp_path / "E"), AutoTokenizer.from_pretrained(tmp_path / "E"))

    return lambda kind: {"trained": as_trained, "exported": exported, "evaluated": lambda: of(*loaded()),
                         "unquantized": lambda: of(*loaded("--load_in_4bit", "False"))}[kind]()


def test_the_same_weights_all_along(repo, logits):
    assert checkpoints.read_agreement(repo / CHECKPOINT)["quantization"] == four_bits.NF4
    expected, evaluated, exported, other = map(logits, ("trained", "evaluated", "exported", "unquantized"))
    torch.testing.assert_close(exported, evaluated, rtol=1e-4, atol=1e-4)
    difference = (expected - other).abs().max()
    assert (expected - evaluated).abs().max() < 0.1 * difference


@pytest.mark.parametrize("stage, adapter", [("gcim", True), ("llm", True)])
def test_a_checkpoints_own_card(repo, stage, adapter):
    """No way of loading stands there that leaves out what was trained; the commands that do are this project's."""
    text = (repo / f"outputs/{stage}/checkpoint-6" / checkpoint_card.README).read_text()
    assert "The base was `models/tiny`, in 4 bits (NF4)." in text and "# Step 6" in text
    assert "PeftModel" not in text and "trainable_params.safetensors" in text and "library_name" not in text
    for command in re.findall(r"`python (\S+) ", text):
        assert (repo / command).is_file()
    assert max(map(len, text.splitlines())) <= 120


def test_the_card_of_a_whole_model(tmp_path):
    agreement = {"paths": {}, "quantization": four_bits.NONE, "trained": []}
    checkpoint_card.write(tmp_path, agreement, 7, adapter=False)
    text = (tmp_path / checkpoint_card.README).read_text()
    assert "all weights of the LLM" in text and "LoRA" not in text and "not quantized" in text
