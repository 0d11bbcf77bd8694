"""A trained model, as evaluation and export find it: base LLM, tokens of the places, frozen encoders, adapter."""
import argparse
import logging
import os
import re
import shlex
import sys
from pathlib import Path

import torch

from ga_llm.base import artifacts, prompts
from ga_llm.base.cli import UserError, boolean, token_count
from ga_llm.llm import backbone, beside, four_bits
from ga_llm.training import checkpoints, staging
from geo_encoder import injection
from geo_encoder.alignment import read_poi_embeddings
from geo_encoder.gps_tokens import GPSMapping, add_gps_tokens, add_poi_tokens, add_time_tokens

log = logging.getLogger(__name__)

LENGTH = 32768      # of checkpoints that do not tell theirs (paper)
# Flags of evaluation and export, and what a training calls them.
REMEMBERED = {"base_model": "model_name_or_path", "gps_mapping_path": "gps_mapping_path",
              "geoencoder_path": "geoencoder_path", "projector_path": "projector_path",
              "poi_embedding_path": "poi_embedding_path"}
HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")     # a model's name there
TEST_TYPES = {"base": "neither adapter nor place embeddings", "projector": "place embeddings, no adapter",
              "llm": "both"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model and which data set, for `fill_in` and `load`."""
    parser.add_argument("--output_dir", help="stage 2's checkpoint-N; results of other test types in folders there")
    parser.add_argument("--base_model", help="folder of the base LLM (default, here and below: the training's)")
    parser.add_argument("--model_path", help="the same")
    parser.add_argument("--dataset_name", help="that of the training")
    parser.add_argument("--data_path", help=f"the root of the data sets' files, or else {artifacts.DATASETS}")
    parser.add_argument("--cache_dir")
    parser.add_argument("--gps_mapping_path", help="that of the data set")
    parser.add_argument("--geoencoder_path", help="stage 1's geo_encoder_merged.pth; \"\": no GPS embedding")
    parser.add_argument("--poi_embedding_path", help="<ds>_poi_embeddings.npy, where stage 2 was given it")
    parser.add_argument("--projector_path", help="PAM's poi_projector.pth, where stage 2 was given it")
    parser.add_argument("--context_size", type=token_count, help="--model_max_length of the training; if that is not "
                        f"known, {LENGTH}")
    parser.add_argument("--load_in_4bit", type=boolean, help="default: as in the training")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")


def fill_in(args: argparse.Namespace) -> dict:
    """Give each of `add_flags`' flags (and --seq_len) that was left out what the checkpoint remembers.

    Returns the checkpoint's agreement, for `load`. A flag that was given as "" stays so. Raises UserError if a path
    that is needed is not remembered, or not there.
    """
    args.base_model = args.base_model or args.model_path
    _require(args, "output_dir")
    agreement, left_out = checkpoints.read_agreement(args.output_dir), {name for name in vars(args)
                                                                        if getattr(args, name) is None}
    paths = agreement.get("paths", {})

    def is_base(path):      # one without a fingerprint was a name on the hub
        return os.path.isdir(path) or "base_model" not in agreement and HUB.fullmatch(path)

    full = getattr(args, "test_type", "llm") == "llm" and checkpoints.holds_full_model(args.output_dir)
    if full and args.base_model is None and not is_base(paths.get(REMEMBERED["base_model"], "")):
        args.base_model = args.output_dir       # it needs no base but itself
    _recall(args, paths, "base_model", "--base_model", is_base)
    for flag in ("geoencoder_path", "projector_path", "poi_embedding_path"):
        if flag != "geoencoder_path" or not getattr(args, "use_random_projector", False):
            _recall(args, paths, flag, f"--{flag}")
    _require(args, "base_model")
    _fill_in_data_set(args, paths)
    for name in {"context_size", "seq_len"} & left_out:
        setattr(args, name, agreement.get("model_max_length", LENGTH))
    if paths:
        filled = [f"--{name} {shlex.quote(str(value))}" for name, value in vars(args).items()
                  if name in left_out and value is not None]
        log.info("%s: from the training are %s", args.output_dir, " ".join(filled) or "no flags, all are given")
    return agreement


def _fill_in_data_set(args: argparse.Namespace, paths: dict[str, str]) -> None:
    """Name, root and mapping. Whoever names a data set or a root may mean another one than the training's."""
    named, rooted = args.dataset_name is not None, args.data_path is not None
    known = artifacts.dataset_of(paths.get("gps_mapping_path", ""))
    if not named:
        known = artifacts.dataset_of(args.gps_mapping_path or "") or known
    name, root = known or (None, artifacts.DATASETS)
    args.dataset_name = args.dataset_name if named else name
    _require(args, "dataset_name")
    if not rooted:
        there = not named or artifacts.preprocessed(args.dataset_name, root).is_dir()
        args.data_path = str(root if there else artifacts.DATASETS)
    if known is None:
        _recall(args, paths, "gps_mapping_path", "--gps_mapping_path")
    elif not (named or rooted):
        _recall(args, paths, "gps_mapping_path", "--data_path, the root of the data sets, or --gps_mapping_path")
    args.gps_mapping_path = args.gps_mapping_path or (artifacts.preprocessed(args.dataset_name, args.data_path)
                                                      / artifacts.gps_mapping(args.dataset_name))


def _recall(args: argparse.Namespace, paths: dict[str, str], flag: str, way_out: str, is_there=os.path.isfile) -> None:
    path = paths.get(REMEMBERED[flag])
    if getattr(args, flag) is not None or path is None:
        return
    if not is_there(path):
        raise UserError(f"{Path(args.output_dir) / checkpoints.AGREEMENT}: the checkpoint remembers {path[:200]!r}, "
                        f"which is not there; give {way_out}")
    setattr(args, flag, path)


def _require(args: argparse.Namespace, name: str) -> None:
    if not getattr(args, name):
        if name != "output_dir":
            _check_folder(Path(args.output_dir))
        raise UserError(f"--{name} is required" + ", for the checkpoint does not tell it" * (name != "output_dir")
                        + f"; see python {sys.argv[0]} --help")


def _check_folder(folder: Path) -> None:
    """Raises UserError if it is not there, or is a training's, in which the checkpoints lie."""
    last = staging.last_checkpoint(folder if folder.is_dir() else folder.parent)
    what = "not found" if not folder.exists() else last and "the folder of a training, not of a checkpoint"
    if what:
        raise UserError(f"--output_dir {folder}: {what}; give a checkpoint-N of stage 2"
                        + f", such as {last}" * bool(last))


def question_kind(agreement: dict) -> tuple[bool, bool]:
    """Of the questions that a checkpoint was trained on: whether they show similar trajectories; `<POI n>`."""
    shown = agreement.get("questions", {}) if "paths" in agreement else {}
    fields = shown.get("fields")
    return shown.get("use_sim") is True, isinstance(fields, list) and prompts.ALIGNED in fields


def load(args: argparse.Namespace, agreement: dict, mapping: GPSMapping, attention: str, test_type: str = "llm",
         random_encoder: bool = False, to_merge: bool = False):
    """The LLM of `add_flags`' flags, in eval mode, and its tokenizer with the tokens of the places.

    agreement: as of `fill_in`. attention: what `attn_implementation` calls it. test_type: one of `TEST_TYPES`.
    random_encoder: an untrained geo-encoder instead of --geoencoder_path's. A base in 4 bits is dequantized, where that
    is no loss (on a CPU) or it is `to_merge`; args.load_in_4bit is what came of it. Raises UserError if the files are
    not of one training.
    """
    injection.check_paths(args)
    embeddings = read_poi_embeddings(args.poi_embedding_path, mapping) if args.poi_embedding_path else None
    full = test_type == "llm" and checkpoints.holds_full_model(args.output_dir)
    base = args.output_dir if full else args.base_model
    tokenizer = backbone.load_tokenizer(base, args.cache_dir)
    dtype = getattr(torch, args.dtype or backbone.default_dtype())
    args.load_in_4bit = not full and four_bits.choose(agreement.get("quantization"), args.load_in_4bit)
    model = backbone.load_llm(base, args.context_size, attention, dtype, args.load_in_4bit, args.cache_dir)
    if to_merge or not torch.cuda.is_available():
        model = four_bits.dequantize(model)
    token_ids = add_gps_tokens(tokenizer, mapping, model)
    poi_token_ids = add_poi_tokens(tokenizer, mapping, model) if embeddings else None
    time_token_ids = add_time_tokens(tokenizer, model) if shows_moments(agreement) else None
    encoders = {}
    if test_type != "base":
        if random_encoder:
            injection.attach_untrained(model, mapping, token_ids)
        elif test_type == "projector" and not args.geoencoder_path:
            raise UserError("--test_type projector: no encoder; give --geoencoder_path or --use_random_projector True")
        own = {} if random_encoder or test_type != "llm" else checkpoints.released_encoder(args.output_dir)
        path = None if random_encoder or own else args.geoencoder_path
        loaded = injection.load_encoders(model, mapping, token_ids, path, poi_token_ids, embeddings,
                                         args.projector_path)
        if own:
            path = Path(args.output_dir) / checkpoints.ADAPTER
            log.info("%s: holds the geo-encoder trained with the LLM, which takes the place of any other", path)
            loaded.append(injection.trained_encoder(model, mapping, token_ids, own, path))
        encoders = injection.attach_encoders(model, loaded)
    if test_type == "llm":
        checkpoints.check_places(args.output_dir, agreement, mapping, args.gps_mapping_path)
        checkpoints.check_agreement(args.output_dir, agreement, args.context_size,
                                    model.config.max_position_embeddings, None if full else base,
                                    None if random_encoder else encoders)
        llm = model
        norms = not getattr(args, "base_norms", False)
        if full and not norms:
            raise UserError(f"--base_norms True: {args.output_dir} is a whole model, without a base; leave it out")
        model = model if full else checkpoints.load_adapter(model, args.output_dir, agreement, norms)
        width = llm.get_input_embeddings().embedding_dim
        checkpoints.load_beside(args.output_dir, agreement, mapping, width, token_ids, time_token_ids).settle(llm)
    return model.eval(), tokenizer


def shows_moments(agreement: dict) -> bool:
    """Whether the check-ins of the training's questions begin with `<TIME n>`."""
    return beside.MOMENTS in agreement.get("beside", {})


def known_places(args: argparse.Namespace, agreement: dict, mapping: GPSMapping) -> set[str]:
    """The tokens of places and times that stand for something in this model's prompts."""
    times = map(prompts.time_token, range(prompts.MOMENTS)) if shows_moments(agreement) else ()
    return {*mapping.tokens, *(mapping.poi_tokens if args.poi_embedding_path else ()), *times}


def files(args: argparse.Namespace) -> list[Path | str]:
    """What the model was loaded from."""
    return [path for path in (args.base_model, args.output_dir, args.geoencoder_path, args.projector_path,
                              args.poi_embedding_path) if path]
