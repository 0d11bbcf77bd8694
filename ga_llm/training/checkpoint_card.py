"""README.md of a checkpoint: what lies there, and how it is read.

In the place of PEFT's, which names a way to load it that leaves out what was trained beside LoRA, and the encoders.
"""
from pathlib import Path

from ga_llm.base.artifacts import TRAINABLE_PARAMS
from ga_llm.base.writing import atomic_write
from ga_llm.llm import four_bits

README = "README.md"


def write(folder: Path, agreement: dict, step: int, adapter: bool) -> None:
    """agreement: what is written beside it; adapter: whether LoRA was trained, or all of the model."""
    base = agreement["paths"].get("model_name_or_path", "another folder")
    what = (f"""
It holds a LoRA adapter (`adapter_model.safetensors`), and beside it `{TRAINABLE_PARAMS}`:
{len(agreement["trained"])} more weights that were trained, such as embeddings and norms. PEFT's `from_pretrained`
reads the adapter alone, and knows neither those nor the tokens and vectors of places: another model, without an error.
""" if adapter else """
It holds all weights of the LLM. The vectors of places are not among them: read without these it is another model,
without an error.
""")
    text = f"""# Step {step}

A checkpoint of GA-LLM ("Geography-Aware Large Language Models for Next POI Recommendation", arXiv 2505.13526).
The base was `{base}`, {four_bits.describe(agreement["quantization"])}.
{what}
- Measure it: `python test_next_gps.py --output_dir {folder.name}` (of stage 2).
- Make a plain model of it, which transformers loads: `python export.py --output_dir {folder.name} --export_dir E`.
- Go on with it: the command of the training with `--resume_from_checkpoint auto`, or, from its weights alone,
  with `--init_from`.

`ga_llm.json` holds what these commands must agree with, and which flags it was trained with.
"""
    with atomic_write(folder / README) as file:
        file.write(text)
