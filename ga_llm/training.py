"""What both stages set up alike: tokens, pairs, the LLM."""
import dataclasses

import numpy as np
import torch
from transformers import set_seed

from ga_llm import llm, sft_data, token_cache
from ga_llm.arguments import SFTArguments
from geo_encoder.gps_tokens import GPSMapping, add_gps_tokens, add_rows, read_gps_mapping


@dataclasses.dataclass
class Setup:
    mapping: GPSMapping
    token_ids: np.ndarray       # (places,), the token of each place of the mapping
    tokenizer: object
    dataset: token_cache.TokenDataset
    collator: sft_data.AnswerCollator
    model: torch.nn.Module      # the base LLM, with a row for every <GPS n>


def set_up(args: SFTArguments) -> Setup:
    """Fix the seed, read and check all inputs, then load the LLM: frozen in 4 bits, unless it is trained itself."""
    set_seed(args.seed)
    mapping = read_gps_mapping(args.gps_mapping_path)
    tokenizer = llm.load_tokenizer(args.model_name_or_path, args.cache_dir)
    known = len(tokenizer)
    token_ids = add_gps_tokens(tokenizer, mapping)
    dataset = token_cache.load(args.data_path, tokenizer, args.model_max_length, args.gps_mapping_path, args.cache_dir)
    frozen = args.low_rank_training
    model = llm.load_llm(args.model_name_or_path, args.model_max_length,
                         llm.training_attention(args.use_flash_attn, args.use_full_attn),
                         dtype=torch.bfloat16 if args.bf16 and frozen else torch.float32,
                         four_bit=args.load_in_4bit and frozen, cache_dir=args.cache_dir)
    add_rows(model, len(tokenizer), token_ids[token_ids >= known])
    return Setup(mapping, token_ids, tokenizer, dataset, sft_data.AnswerCollator(tokenizer.pad_token_id), model)
