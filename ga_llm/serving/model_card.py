"""The model card of an exported model: what it is, how it is asked, how good it was, and what is not known of it."""
import dataclasses
import datetime
import json
import shlex
from pathlib import Path

from ga_llm.base import prompts
from ga_llm.base.artifacts import DATASETS, USER_HISTORY
from ga_llm.evaluation import pointer_alone
from ga_llm.llm import four_bits
from ga_llm.pairs import spelling
from ga_llm.serving import hub

README = "README.md"
METRICS = ("Acc@1", "Acc@5", "MRR")
BASELINES = {USER_HISTORY: "the count of the user's own visits",      # how a sentence calls them
             pointer_alone.NAME: "the pointer alone"}
MIXTURES = {"--average_with": "[]"}     # flags of the evaluation, and what mixes nothing
LOSS = {"answer": "Loss on the answers alone", "poi_ids": "Loss on every POI id, the questions' too"}
BEYOND = ("pointer", "pointer_without", "geo_output", "geo_encoder", "dropout", "beside_learning_rate", "batch_tokens",
          "weight_decay")       # told where they are not left out
SHOWN = ("lora_r", "lora_alpha", "learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs",
         "per_device_train_batch_size", "gradient_accumulation_steps", "seed")
EXAMPLE = ("2013-01-05 12:00:00", "2013-01-05 18:00:00")


@dataclasses.dataclass
class Model:
    """What the card tells. base: a hub's name or a folder's; base_on_hub: the hub's alone, if it is known; licence: as
    `hub.licence` found it; raw_from: where the check-ins are to be had; counts: {split: {kind: number}} of them.

    quantization: of the base in training, None if that is not known; rounded: whether its weights here are of 4 bits.
    flags: of the training, as the checkpoint or its run.json tells them; step: the checkpoint's; processes: of the
    training; metrics: of metrics.json; each None where it is not told.
    encoders: the names of the modules whose vectors stand in the embedding; first, last: POI ids; places: their number;
    latitude, longitude: of the first, degrees. older: whether transformers 4.5x reads its positions. pointer: whether
    it has one; alone: the metrics without it. prefix: whether the prompt by itself has the tokens that it has in front
    of an answer; gguf: the name of that file, if there is one; space: whether it wants one in front of the prompt.
    """
    folder: Path
    base: str
    dataset: str
    raw_from: str
    questions: dict
    context: int
    dtype: str
    full: bool
    trained: list[str]
    quantization: str | None
    rounded: bool
    flags: dict | None
    step: int | None
    processes: int | None
    metrics: dict | None
    encoders: list[str]
    places: int
    first: int
    last: int
    latitude: float
    longitude: float
    older: bool = True
    base_on_hub: str | None = None
    licence: dict[str, str] = dataclasses.field(default_factory=dict)
    prefix: bool = True
    gguf: str | None = None
    space: bool = False
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    pointer: bool = False
    alone: dict | None = None


def serve_command(model: Model, folder: Path | str) -> str:
    """For vLLM, of the model in `folder`."""
    return f"vllm serve {shlex.quote(str(folder))} --max-model-len {model.context} --dtype {model.dtype}"


def how_to_use(model: Model, folder: Path | str, data_path: str) -> str:
    """The next command, after an export to `folder`; data_path: the root of the data sets."""
    if model.pointer:
        elsewhere = f" --data_path {shlex.quote(data_path)}" * (Path(data_path) != DATASETS)
        return (f"ask it with\n\n    python recommend.py --model {shlex.quote(str(folder))}{elsewhere} "
                f"--check_ins my.csv --time \"{EXAMPLE[1][:-3]}\"\n")
    return f"serve it with vLLM or others (README.md there):\n\n    {serve_command(model, folder)}\n"


def example(model: Model) -> tuple[str, str]:
    """A question of one made-up check-in, with its answer up to where the POI's id begins; and what follows there."""
    then, now = EXAMPLE
    fields, as_token = model.questions["fields"], model.questions.get("answer") == "token"
    shown = prompts.check_in(fields, then, model.first, model.first, model.latitude, model.longitude, "Coffee Shop",
                             model.first)
    seconds, last = (int(datetime.datetime.fromisoformat(f"{time}+00:00").timestamp()) for time in EXAMPLE)
    moment = ""
    if prompts.MOMENT in fields:
        (shown,), moment = prompts.in_tokens([shown], [seconds], last)
    ask = prompts.ask_poi(now, model.first, model.first, model.last)
    pair = prompts.join(prompts.question(model.first, [], [], [shown], ask),
                        prompts.answer_poi(now, model.first, model.first, moment, as_token))
    start, _, _ = spelling.answer_id(pair)
    return pair[:start], pair[start:]


def card(model: Model) -> str:
    """README.md, with the front matter of the Hugging Face hub."""
    then, now = EXAMPLE
    name = model.folder.name
    front = hub.front(name, model.base_on_hub, model.licence, _results(model))
    return f"""---
{front}
---
# {name}

{model.base}, trained to predict the next point of interest (POI) of a user from check-ins, by GA-LLM
("Geography-Aware Large Language Models for Next POI Recommendation", arXiv 2505.13526).
Data set: `{model.dataset}`, {model.places:,} POIs. It is a plain Hugging Face model, which
`AutoModelForCausalLM` and vLLM read without GA-LLM's code. {_older(model)} {_vectors(model)}

## How to ask it

The prompt is one line, and ends where the POI's id begins; what follows is {_follows(model)}. Check-ins stand in order
of time. Users, POIs and categories are the data set's encoded ids (`label_encoding.json`); of a user that is not in it,
the unseen id. An example with one made-up check-in, in quotes for the space at its end:

```json
{json.dumps(example(model)[0], ensure_ascii=False)}
```

A question shows at most {model.questions["max_history"]} check-ins of the user's history and {model.context:,} tokens.
{_similar(model)}There is no chat template: it was not trained on chats. `recommend.py` of GA-LLM's code writes the
question from a user's check-ins, and ranks all POIs exactly, which one answer does not. It reads the data set's files,
with `--data_path` where they are not in `datasets/`:

```bash
python recommend.py --model {shlex.quote(name)} --check_ins my.csv --time "{now[:-3]}" -k 5
```

{_pointer(model) if model.pointer else _served(model)}
## What was trained

{_training(model)}

## How good it is

{_metrics(model)}

## Limits

- {_quantization(model)}
- It knows the POIs of its training alone, and predicts for the time that it is asked about; a place without check-ins
  in the training data has no token.
- Among several likely places, greedy decoding gives one; a sampled answer may be an id that no place has.
- What a check-in shows was fixed in training ({", ".join(model.questions["fields"])}); other wordings were not trained.

## Data and licences

The check-ins are those of `{model.dataset}` ({model.raw_from}). They keep their own terms; those of Foursquare and
Gowalla may not be redistributed. The weights hold a vector of each place and may hold more of the training's
check-ins, which are people's whereabouts. {_licence(model)}
See to all of them before you share it.
{_counts(model)}"""


def _results(model: Model) -> list[hub.EvalResult]:
    """For the hub's `model-index`."""
    if model.metrics is None:
        return []
    parts = {_mixed(model.metrics): model.metrics}
    if model.pointer:
        parts = {f", with the pointer{_mixed(model.metrics)}": model.metrics}
        if model.alone:
            parts[f", the LLM alone{_mixed(model.alone)}"] = model.alone
    return hub.results(parts, model.dataset, model.places, tuple(BASELINES))


def _mixed(metrics: dict) -> str:
    """What the model's probabilities were mixed with before they were measured."""
    settings = metrics.get("settings") or {}
    found = [f", {flag} {settings[flag.strip('-')]}" for flag, none in MIXTURES.items()
             if settings.get(flag.strip("-"), none) != none]
    return "".join(found)


def _licence(model: Model) -> str:
    """What is known of the base's."""
    if model.licence:
        named = model.licence.get("license_name", model.licence["license"])
        return f"The base model's licence (`{named}`, as the base's files tell it) holds for this one, too."
    return ("The base model's licence holds for this one, too; which one that is, none of the base's files told, so "
            "this card has no `license` field: add it.")


def _counts(model: Model) -> str:
    """The data set's, of its stats.json."""
    kinds = next(iter(model.counts.values()), {})
    if not kinds:
        return ""
    lines = [f"| split | {' | '.join(kind.replace('_', '-') for kind in kinds)} |", "|---" * (1 + len(kinds)) + "|",
             *(f"| {split} | {' | '.join(f'{count:,}' for count in counts.values())} |"
               for split, counts in model.counts.items())]
    return "\n" + "\n".join(lines) + "\n"


def _older(model: Model) -> str:
    if model.older:
        return ("Its files are written by transformers 5, and also have the keys that 4.5x looks for (`rope_theta`, "
                "`rope_scaling`): with 4.57, tiny models of Llama's, Mistral's and Qwen's kinds gave the same logits.")
    return "**It needs transformers 5**: its layers scale positions in different ways, which 4.5x would read over."


def _vectors(model: Model) -> str:
    what = {"GCIM": "for `<GPS n>` GCIM's encoding of the place's coordinates",
            "PAM": "for `<POI n>` PAM's projection of the POI's transitions"}
    found = [what[name] for name in model.encoders]
    if (model.flags or {}).get("geo_output"):
        kind = model.flags.get("geo_encoder")
        found.append("for `<GPS n>` sums of its own row, its category's" + f" and the {kind} encoder's" * bool(kind))
    return f"The embedding holds {' and '.join(found)}." if found else "No encoder's vectors stand in its embedding."


def _similar(model: Model) -> str:
    return ("It was trained with check-ins of similar trajectories in front, where there were some; `recommend.py` "
            "shows none. " if model.questions["use_sim"] else "")


def _follows(model: Model) -> str:
    return "the token `<GPS n>`" if _by_token(model) else "the id and a full stop, `n.`"


def _by_token(model: Model) -> bool:
    return model.questions.get("answer") == "token"


def _served(model: Model) -> str:
    """How a stock server serves it."""
    name = model.folder.name
    request = {"model": name, "prompt": "<question>: … POI id ", "temperature": 0, "max_tokens": 8}
    if _by_token(model):
        request |= {"prompt": "<question>: … will visit ", "max_tokens": 1, "skip_special_tokens": False}
    lines = ["Served as one model among others (not tried by those who wrote this card), by vLLM or, after "
             '`pip install "transformers[serving]"`, by `transformers serve`:', "", "```bash",
             serve_command(model, name), f"transformers serve {shlex.quote(name)}        # or this one",
             'curl http://localhost:8000/v1/completions -H "Content-Type: application/json" -d '
             f"{shlex.quote(json.dumps(request, ensure_ascii=False))}", "```"]
    if _by_token(model):
        lines += ["", "`transformers serve` leaves tokens such as `<GPS n>` out of its answers: not for this model."]
    if not model.prefix:
        lines += ["", "**Not by text**: its tokenizer reads the end of a text otherwise than its middle. A server must "
                  "be given token ids (vLLM takes them as `prompt`): those of the prompt and an id, without the id's."]
    if model.gguf:
        space = " It must be given a space in front of the prompt." if model.space else ""
        lines += ["", f"`{model.gguf}` is the same model in one file, for llama.cpp and what is built on it.{space}"]
    return "\n".join([*lines, ""])


def _pointer(model: Model) -> str:
    """What a server that knows nothing of the pointer leaves out."""
    cost = ("What that costs in Acc@1 was not measured on the test split (`test_next_gps.py`, and once more with "
            "`--pointer False`).")
    if model.metrics is not None and model.alone is not None:
        cost = (f"Its Acc@1 on the same questions is {_cell(model.alone['all']['model'].get('Acc@1'))}, with the "
                f"pointer {_cell(model.metrics['all']['model'].get('Acc@1'))}.")
    return f"""## The pointer

`pointer.safetensors` is a second part of the model, a pointer to the question's check-ins by their times and distances,
whose probabilities are mixed with the LLM's. `recommend.py` uses it. **A stock server does not, and answers by the LLM
alone, which is another model.** {cost}
{_moments(model)}{_gguf_alone(model)}"""


def _gguf_alone(model: Model) -> str:
    return f"`{model.gguf}`, for llama.cpp, holds the LLM alone, too.\n" if model.gguf else ""


def _moments(model: Model) -> str:
    return ("`<TIME m>` stands for a weekday, a half hour and the time since the check-in before; `recommend.py` "
            "writes it.\n" if prompts.MOMENT in model.questions["fields"] else "")


def _training(model: Model) -> str:
    lines = ["- All weights." if model.full else "- LoRA on the attention's projections, merged into the weights here."]
    if model.trained and not model.full:
        kinds = sorted({kind for name in model.trained for kind in ("embed", "norm") if kind in name})
        lines.append(f"- Beside it {len(model.trained)} other weights ({', '.join(kinds or model.trained[:5])}).")
    if model.flags is None:
        return "\n".join([*lines, "- Neither the checkpoint nor a run.json tells the flags of its training: what its "
                          "loss was on, and its other settings, are not known."])
    flags = model.flags
    lines.append(f"- {LOSS.get(flags.get('loss_on'), 'On what its loss was is not known')}, questions of at most "
                 f"{model.context:,} tokens.")
    if flags.get("label_smoothing_factor"):
        lines.append(f"- Labels smoothed by {flags['label_smoothing_factor']}.")
    if "use_full_attn" in flags:
        lines.append("- Full attention." if flags["use_full_attn"] else "- S²-Attn (LongLoRA), in training alone.")
    if flags.get("init_from"):
        lines.append("- It began with the weights of another run, whose settings are not told here.")
    hidden = {*(("lora_r", "lora_alpha") if model.full else ()),
              "num_train_epochs" if (flags.get("max_steps") or -1) > 0 else "max_steps",
              *["per_device_train_batch_size"] * bool(flags.get("batch_tokens"))}
    told = [f"{name} {flags[name]}" for name in SHOWN if name not in hidden and flags.get(name) is not None]
    told += [f"{name} {flags[name]}" for name in BEYOND if flags.get(name)]
    told = [f"step {model.step}"] * (model.step is not None) + told
    told += [f"processes {model.processes}"] * (model.processes is not None)
    return "\n".join([*lines, f"- {', '.join(told)}."] if told else lines)


def _metrics(model: Model) -> str:
    if model.metrics is None:
        return "No evaluation lay beside the checkpoint. Measure it (`test_next_gps.py`) before you rely on it."
    found = model.metrics["all"]
    n = found["model"]["n"]
    file = (model.metrics.get("settings") or {}).get("test_file")
    file = f"the questions of `{Path(file).name}`" if file else "questions of which no file is told"
    lines = [f"On {file}, n = {n:,} (protocol {model.metrics.get('protocol', 'not told')}, decoding "
             f"{model.metrics.get('decoding', 'not told')}), value [95 % bootstrap interval], before merging"
             f"{_mixed(model.metrics)}. The baselines need no LLM.", "",
             f"| | {' | '.join(METRICS)} |", "|---" * (1 + len(METRICS)) + "|"]
    for name in ("model", *BASELINES):
        if name not in found:       # the pointer, where it has not been trained
            continue
        row = found[name]
        lines.append(f"| {name} | {' | '.join(_cell(row.get(metric)) for metric in METRICS)} |")
    return "\n".join([*lines, "", _verdict(found)])


def _cell(value: dict | None) -> str:
    return "–" if value is None else f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def _verdict(found: dict) -> str:
    known = [name for name in BASELINES if "Acc@1" in found.get(name, {})]
    if not known or "Acc@1" not in found["model"]:
        return "There is no baseline to hold it against, so the figures say little."
    return " ".join(_held_against(BASELINES[name], found["model"]["Acc@1"], found[name]["Acc@1"]) for name in known)


def _held_against(whom: str, model: dict, baseline: dict) -> str:
    if model["low"] > baseline["high"]:
        return f"In Acc@1 it is better than {whom}: the intervals do not overlap."
    if model["high"] < baseline["low"]:
        return f"In Acc@1 it is worse than {whom}: the intervals do not overlap."
    return f"In Acc@1 its interval and that of {whom} overlap: that it is better is not shown."


def _quantization(model: Model) -> str:
    if model.full:
        return "All weights were trained, none of them quantized: this is the model that was trained."
    into = ("weights as they are when rounded to 4 bits (NF4)" if model.rounded else "unquantized weights")
    if model.quantization is None:
        return ("Whether the base was quantized to 4 bits in training is not known. LoRA is merged into its "
                f"{into} here: if it was trained on others, that is not exactly the model that was trained.")
    was = four_bits.describe(model.quantization)
    if (model.quantization == four_bits.NF4) == model.rounded:
        return f"The base was {was} in training, and LoRA is merged into these weights; the rest is rounding."
    return (f"The base was {was} in training, and LoRA is merged into its {into} here: not the model that was trained. "
            "Measure again what matters.")
