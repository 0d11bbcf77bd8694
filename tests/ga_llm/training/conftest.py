"""A run of a stage in this process, for tests of what it leaves and where it stops."""
import json

import pytest
import torch
from torch.utils.data import Subset
from transformers import TrainerCallback, set_seed

from ga_llm.llm import backbone
from ga_llm.pairs import sft_data, token_cache
from ga_llm.training import arguments, resuming, trainers, validation
from geo_encoder import encoder, gps_tokens, injection, weights

PAIRS = [f"<question>: user 1 POI id {i} <GPS {i}>. Where next? <answer>: user 1 will visit POI id {i}."
         for i in (1, 2, 3, 5)]
HELD_OUT = [pair.replace("user 1", "user 2") for pair in PAIRS[:3]]


@pytest.fixture
def train(tiny_llama, mapping_csv, tmp_path):
    """train(stage, **flags): one run of a stage in this process; returns the trainer."""
    def run(stage, tied=False, interrupt_at=None, lengths=None, train_encoders=False, dropout=0.0, **flags):
        folder = tiny_llama(tie_embeddings=tied)
        data = tmp_path / "pairs.json"
        data.write_text(json.dumps([dict(zip(("question", "answer"), pair.split(" <answer>", 1))) for pair in PAIRS])
                        .replace('"answer": "', '"answer": "<answer>'))
        options = {"model_name_or_path": folder, "data_path": data, "gps_mapping_path": mapping_csv,
                   "output_dir": tmp_path / f"stage{stage}", "model_max_length": 256, "load_in_4bit": False,
                   "max_steps": 4, "save_steps": 2, "save_total_limit": 1, "learning_rate": 0.01, **flags}
        if "eval_strategy" in flags:
            options.setdefault("eval_data_path", tmp_path / "validate.txt")
            (tmp_path / "validate.txt").write_text("".join(f"{pair}\n" for pair in HELD_OUT))
        args = arguments.parse(arguments.SFTArguments, [p for k, v in options.items() for p in (f"--{k}", str(v))])
        set_seed(args.seed)
        mapping, tokenizer = gps_tokens.read_gps_mapping(mapping_csv), backbone.load_tokenizer(folder)
        model = backbone.load_llm(folder, 256, "sdpa", torch.float32)
        token_ids = gps_tokens.add_gps_tokens(tokenizer, mapping, model)
        config = encoder.GeoEncoderConfig(model.config.hidden_size)
        geo, base = encoder.build_encoder(config), model
        common = {"args": args, "processing_class": tokenizer,
                  "train_dataset": token_cache.load(data, tokenizer, 256, mapping_csv),
                  "data_collator": sft_data.AnswerCollator(tokenizer.pad_token_id)}
        if args.evaluates:
            questions = token_cache.load(args.eval_data_path, tokenizer, 256, mapping_csv)
            common["eval_dataset"] = validation.Drawn(questions, args.eval_limit)
        if stage == 1:
            weights.add_lora(geo, 4, 8)
            model = backbone.add_lora(model, 4, 8, 0.0)
            injection.attach(base, injection.gps_injection(geo, 25, mapping, token_ids))
            trainer = trainers.EncoderTrainer(model=model, trained=[trainers.Trained(geo, config)], **common)
        else:
            file = tmp_path / "e" / "geo_encoder_merged.pth"
            weights.save_encoder(geo.state_dict(), config, file)
            loaded = injection.load_encoders(model, mapping, token_ids, file)
            if args.low_rank_training:
                model = backbone.add_lora(model, 8, 16, 0.1)
                backbone.train_by_name(model, "embed,norm")
            if train_encoders:
                injection.attach_trained(base, loaded)
                trainer = trainers.EncoderTrainer(model=model, **common, encoders={}, trained=[
                    trainers.Trained(one.injection.encoder, one.config, one.files) for one in loaded])
            else:
                found = injection.attach_encoders(base, loaded)
                trainer = trainers.GATrainer(model=model, encoders=found, **common)
            if dropout:
                backbone.add_dropout(base, dropout)
        if lengths is not None:
            trainer.train_dataset = Subset(trainer.train_dataset, range(len(PAIRS)))     # whose own lengths stay
            trainer.train_dataset.lengths = lengths
        if interrupt_at is not None:
            trainer.add_callback(Interruption(interrupt_at))
        has_trained = resuming.train(trainer)
        if stage == 1:
            trainer.save_final_encoders(has_trained)
        return trainer

    return run


class Interrupted(Exception):
    """What no script knows of, as a kill."""


class Interruption(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.step:
            raise Interrupted


@pytest.fixture
def interrupted():
    """What a run raises that is interrupted: train(stage, interrupt_at=N)."""
    return Interrupted
