"""What trainings set up alike: tokens, pairs, the LLM; and in stage 1 the module before it."""
import dataclasses
import logging

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import set_seed

from ga_llm.base import writing
from ga_llm.base.artifacts import GCIM, EncoderFiles, question_settings
from ga_llm.base.cli import UserError
from ga_llm.base.prompts import MOMENT
from ga_llm.base.reading import read_json
from ga_llm.llm import backbone, pointing, shared_prefix
from ga_llm.pairs import check_ins, sft_data, token_cache
from ga_llm.training import batches, preemption, validation
from ga_llm.training.arguments import SFTArguments
from geo_encoder import injection
from geo_encoder.alignment import POIEmbeddings, read_poi_embeddings
from geo_encoder.gps_tokens import (GPSMapping, add_gps_tokens, add_poi_tokens, add_rows, add_time_tokens,
                                    read_gps_mapping)

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Setup:
    mapping: GPSMapping
    token_ids: np.ndarray       # (places,), the <GPS n> of each place of the mapping
    poi_embeddings: POIEmbeddings | None    # of the places, where --poi_embedding_path is given
    poi_token_ids: np.ndarray | None        # (places,), their <POI n>
    time_token_ids: np.ndarray | None       # the <TIME n>, where the questions have them
    check_ins: check_ins.CheckIns | None    # of the pairs, where --pointer or --geo_output asks for them
    tokenizer: object
    dataset: token_cache.TokenDataset       # the pairs
    train_dataset: object                   # what a batch is drawn from: the pairs, or trees of them
    eval_dataset: object | None             # the same of the validation questions, where --eval_strategy asks for them
    collator: object
    model: torch.nn.Module      # the base LLM, with a row for every token of a place


def set_up(args: SFTArguments) -> Setup:
    """Fix the seed, read and check all inputs, then load the LLM: frozen in 4 bits, unless it is trained itself.

    Raises UserError if another run is writing into --output_dir, which this one keeps until its process ends. Until
    then SIGTERM and SIGUSR1 ask it to stop in good order, unless it is a dry run.
    """
    if not args.dry_run:
        preemption.listen()
    if args.process_index == 0 and not args.dry_run:
        writing.hold(args.output_dir)
    set_seed(args.seed)
    mapping = read_gps_mapping(args.gps_mapping_path)
    poi_path = getattr(args, "poi_embedding_path", None)
    poi_embeddings = read_poi_embeddings(poi_path, mapping) if poi_path else None
    tokenizer = backbone.load_tokenizer(args.model_name_or_path, args.cache_dir)
    known = len(tokenizer)
    token_ids = add_gps_tokens(tokenizer, mapping)
    poi_token_ids = add_poi_tokens(tokenizer, mapping) if poi_path else None
    time_token_ids = add_time_tokens(tokenizer) if shows_moments(args.data_path) else None
    dataset, shown = read_pairs(args, args.data_path, tokenizer, mapping, token_ids)
    train_dataset, eval_dataset = in_batches(args, dataset), None
    if args.evaluates:
        questions, _ = read_pairs(args, args.eval_data_path, tokenizer, mapping, token_ids, answers_alone=True)
        eval_dataset = in_batches(args, validation.Drawn(questions, args.eval_limit))
    collator = make_collator(args, tokenizer, len(mapping.ids) if getattr(args, "pointer", False) else None)
    frozen = args.low_rank_training
    attention = backbone.training_attention(args.use_flash_attn, args.use_full_attn, args.shared_prefix)
    model = backbone.load_llm(args.model_name_or_path, args.model_max_length, attention,
                              dtype=torch.bfloat16 if args.bf16 and frozen else torch.float32,
                              four_bit=args.load_in_4bit and frozen, cache_dir=args.cache_dir)
    backbone.round_norms(model)
    added = np.concatenate([ids for ids in (token_ids, poi_token_ids, time_token_ids) if ids is not None])
    add_rows(model, len(tokenizer), added[added >= known])
    return Setup(mapping, token_ids, poi_embeddings, poi_token_ids, time_token_ids, shown, tokenizer, dataset,
                 train_dataset, eval_dataset, collator, model)


def read_pairs(args: SFTArguments, path: str, tokenizer, mapping: GPSMapping, token_ids: np.ndarray,
               answers_alone: bool = False) -> tuple[Dataset, check_ins.CheckIns | None]:
    """The pairs of a question file as `args` train on them, and what they show where --pointer or --geo_output asks.

    answers_alone: with --loss_on poi_ids, the ids of the answers, and not the prompts'.
    """
    pointer, every = getattr(args, "pointer", False), args.loss_on == "poi_ids"
    shown = None
    if pointer or getattr(args, "geo_output", False):
        shown = check_ins.read(path, mapping.ids)
    dataset = token_cache.load(path, tokenizer, args.model_max_length, args.gps_mapping_path, args.cache_dir,
                               poi_ids=every or pointer, answers_alone=every and answers_alone)
    if dataset.targets is not None and not any(dataset[i]["targets"].any() for i in range(len(dataset))):
        raise UserError(f"--loss_on poi_ids: {path} names no POI id; leave it out")
    if pointer:
        dataset = pointing.PointedPairs(dataset, shown, token_ids, every)
    return dataset, shown


def in_batches(args: SFTArguments, dataset: Dataset) -> Dataset:
    """What a batch is made of: the pairs, trees of them (--shared_prefix) or batches of tokens (--batch_tokens)."""
    if args.shared_prefix:
        trees = shared_prefix.TreeDataset(dataset, args.tree_tokens or 2 * args.model_max_length)
        log.info("%d pairs in %d trees, which a batch is made of: %d tokens instead of %d", len(dataset), len(trees),
                 trees.lengths.sum(), dataset.lengths.sum())
        return trees
    if args.batch_tokens:
        made = batches.TokenBatches(dataset, args.batch_tokens, args.seed)
        log.info("%d pairs in %d batches of at most %d tokens", len(dataset), len(made), args.batch_tokens)
        return made
    return dataset


def make_collator(args: SFTArguments, tokenizer, places: int | None):
    """places: how many there are, for the pointer; None without one."""
    if args.shared_prefix:
        return shared_prefix.TreeCollator(places)
    collator = sft_data.AnswerCollator(tokenizer.pad_token_id)
    collator = collator if places is None else pointing.PointedCollator(collator, places)
    return batches.Unpacked(collator) if args.batch_tokens else collator


def shows_moments(questions: str) -> bool:
    """Whether the check-ins of a question file begin with `<TIME n>`, as its settings say."""
    settings = question_settings(questions)
    return settings.exists() and MOMENT in (read_json(settings).get("fields") or ())


def for_stage_1(llm: torch.nn.Module, injected: injection.Injection | None, rank: int, alpha: int,
                low_rank: bool = True, files: EncoderFiles = GCIM) -> torch.nn.Module:
    """`llm` as stage 1 trains it, frozen but for LoRA of its own (not `low_rank`: all of it), with a module in the
    place of its embeddings of `<GPS n>`, or PAM's `<POI n>` (`files`). What is trained is in fp32.
    """
    model = backbone.add_lora(llm, rank, alpha, dropout=0.0) if low_rank else llm
    if injected is not None:
        injection.attach(llm, injected, injection.INJECTIONS[files])
    backbone.trainable_to_fp32(model)
    return model
