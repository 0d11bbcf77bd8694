"""A trained model, as evaluation and export find it: base LLM, tokens of the places, frozen encoders, adapter."""
import argparse
from pathlib import Path

import torch

from ga_llm.base.cli import UserError, boolean, token_count
from ga_llm.llm import backbone
from ga_llm.training import checkpoints
from geo_encoder import injection
from geo_encoder.alignment import read_poi_embeddings
from geo_encoder.gps_tokens import GPSMapping, add_gps_tokens, add_poi_tokens

TEST_TYPES = {"base": "neither adapter nor place embeddings", "projector": "place embeddings, no adapter",
              "llm": "both"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model, for `load`."""
    parser.add_argument("--base_model", help="folder of the base LLM (default: --model_path)")
    parser.add_argument("--model_path", help="the same")
    parser.add_argument("--output_dir", help="stage 2's checkpoint-N; results of other test types in folders there")
    parser.add_argument("--cache_dir")
    parser.add_argument("--gps_mapping_path", help="default: that of the data set")
    parser.add_argument("--geoencoder_path", help="stage 1's geo_encoder_merged.pth; without it no GPS embedding")
    parser.add_argument("--poi_embedding_path", help="<ds>_poi_embeddings.npy, where stage 2 was given it")
    parser.add_argument("--projector_path", help="PAM's poi_projector.pth, where stage 2 was given it")
    parser.add_argument("--context_size", type=token_count, default=32768, help="--model_max_length of the training")
    parser.add_argument("--load_in_4bit", type=boolean, default=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")


def load(args: argparse.Namespace, mapping: GPSMapping, attention: str, test_type: str = "llm",
         random_encoder: bool = False):
    """The LLM of `add_flags`' flags, in eval mode, and its tokenizer with the tokens of the places.

    attention: what `attn_implementation` calls it. test_type: one of `TEST_TYPES`. random_encoder: an untrained
    geo-encoder instead of --geoencoder_path's. Raises UserError if the files are not of one training.
    """
    injection.check_paths(args)
    embeddings = read_poi_embeddings(args.poi_embedding_path, mapping) if args.poi_embedding_path else None
    full = test_type == "llm" and checkpoints.holds_full_model(args.output_dir)
    base = args.output_dir if full else args.base_model
    tokenizer = backbone.load_tokenizer(base, args.cache_dir)
    dtype = getattr(torch, args.dtype or backbone.default_dtype())
    four_bit = args.load_in_4bit and torch.cuda.is_available() and not full
    model = backbone.load_llm(base, args.context_size, attention, dtype, four_bit, args.cache_dir)
    token_ids = add_gps_tokens(tokenizer, mapping, model)
    poi_token_ids = add_poi_tokens(tokenizer, mapping, model) if embeddings else None
    encoders = {}
    if test_type != "base":
        if random_encoder:
            injection.attach_untrained(model, mapping, token_ids)
        elif test_type == "projector" and not args.geoencoder_path:
            raise UserError("--test_type projector: no encoder; give --geoencoder_path or --use_random_projector True")
        path = None if random_encoder else args.geoencoder_path
        encoders = injection.attach_encoders(model, injection.load_encoders(
            model, mapping, token_ids, path, poi_token_ids, embeddings, args.projector_path))
    if test_type == "llm":
        checkpoints.check_agreement(args.output_dir, args.context_size, model.config.max_position_embeddings,
                                    None if full else base, None if random_encoder else encoders)
        model = model if full else checkpoints.load_adapter(model, args.output_dir)
    return model.eval(), tokenizer


def known_places(args: argparse.Namespace, mapping: GPSMapping) -> set[str]:
    """The tokens of places that stand for something in this model's prompts."""
    return {*mapping.tokens, *(mapping.poi_tokens if args.poi_embedding_path else ())}


def files(args: argparse.Namespace) -> list[Path | str]:
    """What the model was loaded from."""
    return [path for path in (args.base_model, args.output_dir, args.geoencoder_path, args.projector_path,
                              args.poi_embedding_path) if path]
