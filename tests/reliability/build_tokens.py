"""The token cache alone, as a script: build_tokens.py MODEL MAPPING QUESTIONS CACHE_DIR."""
import sys

from ga_llm.base import cli
from ga_llm.llm import backbone
from ga_llm.pairs import token_cache
from geo_encoder import gps_tokens


def main():
    model, mapping, questions, cache_dir = sys.argv[1:]
    tokenizer = backbone.load_tokenizer(model)
    gps_tokens.add_gps_tokens(tokenizer, gps_tokens.read_gps_mapping(mapping))
    print(token_cache.load(questions, tokenizer, 4096, mapping, cache_dir).lengths.sum())


if __name__ == "__main__":
    cli.run(main)
