"""What both stages set up alike: tokens, pairs, the LLM."""
import dataclasses

import numpy as np
import torch
from transformers import set_seed

from ga_llm import llm, sft_data
from ga_llm.arguments import SFTArguments
from geo_encoder.gps_tokens import GPSMapping, add_gps_tokens, read_gps_mapping


@dataclasses.dataclass
class Setup:
    mapping: GPSMapping
    token_ids: np.ndarray       # (places,), the token of each place of the mapping
    tokenizer: object
    dataset: sft_data.PairDataset
    collator: sft_data.AnswerCollator
    model: torch.nn.Module      # the base LLM, with a row for every <GPS n>


def set_up(args: SFTArguments) -> Setup:
    """Fix the seed, read and check all inputs, then load the LLM: frozen in 4 bits, unless it is trained itself."""
    set_seed(args.seed)
    mapping = read_gps_mapping(args.gps_mapping_path)
    pairs = sft_data.read_pairs(args.data_path)
    sft_data.check_gps_ids(pairs, mapping.ids, args.data_path, args.gps_mapping_path)
    tokenizer = llm.load_tokenizer(args.model_name_or_path, args.cache_dir)
    frozen = args.low_rank_training
    model = llm.load_llm(args.model_name_or_path, args.model_max_length,
                         llm.training_attention(args.use_flash_attn, args.use_full_attn),
                         dtype=torch.bfloat16 if args.bf16 and frozen else torch.float32,
                         four_bit=args.load_in_4bit and frozen, cache_dir=args.cache_dir)
    token_ids = add_gps_tokens(tokenizer, mapping, model)
    return Setup(mapping, token_ids, tokenizer, sft_data.PairDataset(pairs, tokenizer, args.model_max_length),
                 sft_data.AnswerCollator(tokenizer.pad_token_id), model)
