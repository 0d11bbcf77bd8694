"""A tiny random Llama with a tokenizer that splits digits: for tests, and for training small models from scratch.

    python tools/make_tiny_llama.py --output_dir models/tiny --hidden 64 --layers 2 --heads 4

The folder loads with AutoTokenizer and AutoModelForCausalLM like any base model. The same flags and seed give the
same folder. The tokenizer is a BPE trained on text of ga_llm.prompts, or on a file (--corpus):

    --style llama3          byte-level, as in Llama 3, Qwen and SmolLM2 (but one token a digit)
    --style sentencepiece   as in Llama 2: "▁" for spaces, byte fallback, one token a digit

    python tools/make_tiny_llama.py --words train_qa_pairs_….json --tie_embeddings True …

makes instead a tokenizer for the prompts of that question file alone, whose check-ins are two tokens each (`-fields
moment,gps -answer token`): what stands between them, such as a heading or a user, is one token, too.
"""
import collections
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs without an installation, too

from ga_llm.base import cli, prompts  # noqa: E402 (before transformers)
from ga_llm.base.artifacts import require  # noqa: E402
from ga_llm.base.cli import UserError, token_count, whole_number  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import (Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,  # noqa: E402
                        trainers)
from transformers import (GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer,  # noqa: E402
                          PreTrainedTokenizerFast)

from ga_llm.pairs.sft_data import iterate_pairs  # noqa: E402

log = logging.getLogger("make_tiny_llama")

STYLES = ("llama3", "sentencepiece")
WORDS = "words"
BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<pad>"
CATEGORIES = ("Coffee Shop", "Home (private)", "Office", "Train Station", "Gym / Fitness Center", "Bar", "Park",
              "Café", "Food & Drink Shop", "Movie Theater", "Bus Station", "Neighborhood", "Subway", "Deli / Bodega")
CORPUS_BYTES = 16 * 2**20  # more text does not change a vocabulary of a thousand pieces


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("models/tiny"))
    parser.add_argument("--style", choices=STYLES, default=STYLES[0])
    parser.add_argument("--corpus", type=Path, help="text to train the tokenizer on, such as a test question file")
    parser.add_argument("--words", type=Path,
                        help="a training question file of two tokens a check-in: headings and users are tokens, too")
    parser.add_argument("--vocab_size", type=whole_number(300, 2**24), default=1024, help="at most so many tokens")
    parser.add_argument("--hidden", type=whole_number(2, 2**20), default=64)
    parser.add_argument("--intermediate", type=whole_number(1, 2**20),
                        help="width of the feed-forward layer; default: 3 x hidden")
    parser.add_argument("--layers", type=whole_number(0, 2**20), default=2, help="0: the state is the token's row")
    parser.add_argument("--heads", type=whole_number(1, 2**20), default=4)
    parser.add_argument("--kv_heads", type=whole_number(1, 2**20), help="default: as many as heads")
    parser.add_argument("--max_position", type=token_count, default=2048, help="longest prompt, without RoPE scaling")
    parser.add_argument("--initializer_range", type=float, default=.02, help="standard deviation of the random weights")
    parser.add_argument("--tie_embeddings", type=cli.boolean, default=False)
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0)
    args = parser.parse_args()

    if not cli.show_progress():
        transformers.utils.logging.disable_progress_bar()
    options = vars(args)
    folder, corpus, words = (options.pop(name) for name in ("output_dir", "corpus", "words"))
    if words is not None:
        if corpus is not None:
            raise UserError("--words, --corpus: exclude each other; give one of them")
        corpus, options["style"] = read_pairs(words), WORDS
    elif corpus is not None:
        corpus = read_corpus(corpus)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; remove it or choose another --output_dir")
    model = make_tiny_llama(folder, corpus=corpus, **options)
    log.info("wrote %s: random Llama, %.2f M parameters, %d tokens, tokenizer in the style of %s", folder,
             model.num_parameters() / 1e6, model.config.vocab_size, options["style"])


def make_tiny_llama(folder: Path | str, *, style: str = STYLES[0], corpus: Iterable[str] | None = None,
                    vocab_size: int = 1024, hidden: int = 64, intermediate: int | None = None, layers: int = 2,
                    heads: int = 4, kv_heads: int | None = None, max_position: int = 2048,
                    tie_embeddings: bool = False, seed: int = 0, initializer_range: float = .02) -> LlamaForCausalLM:
    """Write a random float32 Llama and its tokenizer into `folder` and return the model.

    `corpus` yields texts to train the tokenizer on; by default prompts with random places. The global random state of
    torch is left as it was. Raises UserError for sizes that do not make a Llama.
    """
    kv_heads = kv_heads or heads
    if hidden % (2 * heads) or heads % kv_heads:
        raise UserError(f"--hidden {hidden} must be a multiple of twice --heads {heads} (RoPE turns pairs), "
                        f"and --heads one of --kv_heads {kv_heads}; give others")
    train = {"llama3": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer,
             WORDS: words_tokenizer}[style]
    tokenizer = train(corpus if corpus is not None else sample_prompts(seed), vocab_size)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=intermediate or 3 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=max_position, tie_word_embeddings=tie_embeddings, initializer_range=initializer_range,
        **special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def byte_level_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, one token a digit, BOS in front, no unknown token: every text has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def sentencepiece_tokenizer(corpus: Iterable[str], vocab_size: int) -> LlamaTokenizer:
    """Llama 2's own tokenizer class over a small vocabulary: <unk>, <s>, </s>, the 256 bytes, then the pieces.

    Like Llama 2's it has no padding token: whoever pads must bring one.
    """
    fixed = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True))
    # Only for training: pieces that never cross a space or touch a digit. LlamaTokenizer then needs no such cuts.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=fixed, show_progress=False, initial_alphabet=list("0123456789")))
    trained = json.loads(tokenizer.to_str())["model"]
    return LlamaTokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]],
                          add_bos_token=True)


# The question's and the answer's sentence, which a words tokenizer passes over: the target's own <TIME n> repeats the
# time ("… At 2012-…, which POI …? … <answer>: At …, user 17 will visit <TIME 5><GPS 9>.").
PASSED_OVER = (r"At [0-9: -]{19}, which POI will user [0-9]+ visit\? POI ids range from [0-9]+ to [0-9]+\. "
               r"<answer>: At [0-9: -]{19}, user [0-9]+ will visit ")
USER = r"user [0-9]+:?"     # a token by itself; all between two of them is another


def words_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Joined pairs whose check-ins are tokens (`-fields moment,gps -answer token`), and what stands between as words:
    each user, and each heading, is one token.

    The most frequent pieces become words; what is none is spelled in bytes.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(PASSED_OVER), ""),
                                                 normalizers.Strip(left=False, right=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(USER), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    counts = collections.Counter()
    for pair in corpus:
        for part in filter(None, prompts.PLACE_TOKEN.sub("\0", pair).split("\0")):
            pieces = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(part))
            counts.update(piece for piece, _ in pieces)
    # ". " as a token tells the training's reader that a text may not be cut there.
    fixed = [EOS, PAD, *sorted(pre_tokenizers.ByteLevel.alphabet()), ".Ġ"]
    words = sorted(set(counts).difference(fixed), key=lambda word: (-counts[word], word))
    vocabulary = dict.fromkeys([*fixed, *words[:max(0, vocab_size - len(fixed))]])
    tokenizer.model = models.BPE(vocab={word: i for i, word in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def sample_prompts(seed: int, count: int = 500) -> Iterator[str]:
    """Joined questions and answers with random times, users and places."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        check_ins = [random_check_in(draw) for _ in range(10)]
        user, poi, time = int(draw.integers(1000)), int(draw.integers(5000)), random_time(draw)
        latitude, longitude = draw.uniform(-90, 90), draw.uniform(-180, 180)
        yield prompts.join(
            prompts.question(user, check_ins[:2], check_ins[2:6], check_ins[6:], prompts.ask_poi(time, user, 0, 4999)),
            prompts.answer_poi(time, user, poi))
        yield prompts.join(
            prompts.question(user, check_ins[:2], check_ins[2:6], check_ins[6:], prompts.ask_coordinates(poi)),
            prompts.answer_coordinates(latitude, longitude))


def random_check_in(draw: np.random.Generator) -> str:
    category = int(draw.integers(len(CATEGORIES)))
    return prompts.check_in(prompts.FIELDS, random_time(draw), int(draw.integers(1000)), int(draw.integers(5000)),
                            draw.uniform(-90, 90), draw.uniform(-180, 180), CATEGORIES[category], category)


def random_time(draw: np.random.Generator) -> str:
    moment = np.datetime64("2012-04-01T00:00:00") + np.timedelta64(int(draw.integers(300 * 86400)), "s")
    return str(moment).replace("T", " ")


def read_pairs(path: Path) -> Iterator[str]:
    """The joined pairs of a question file for --words. Raises UserError if one shows a POI's id as text."""
    for number, pair in enumerate(iterate_pairs(require(path, "python data-preprocess/process_llm_gps.py"))):
        if re.search("POI id [0-9]", pair):
            raise UserError(f"--words {path}, pair {number}: shows a POI's id as text; make the questions with -fields "
                            "moment,gps -answer token, or leave --words out")
        yield pair


def read_corpus(path: Path) -> list[str]:
    """The lines of the first 16 MB of a text file."""
    try:
        with path.open(encoding="utf-8", errors="ignore") as file:
            lines = file.read(CORPUS_BYTES).splitlines()
    except OSError as error:
        raise UserError(f"--corpus {path}: {error.strerror}; give a file of text") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"--corpus {path}: no text in it; give another file, or leave it out")
    return lines


if __name__ == "__main__":
    cli.run(main)
