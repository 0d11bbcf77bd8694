"""Export a trained model as a plain Hugging Face folder, which transformers and vLLM serve without this project.

    python export.py --output_dir O/checkpoint-N --export_dir exported \
        [--base_model M --dataset_name nyc --gps_mapping_path G.csv --context_size 32768 \
         --geoencoder_path O1/N/geo_encoder_merged.pth \
         --poi_embedding_path E.npy --projector_path P1/N/poi_projector.pth]

The checkpoint remembers what stands in brackets; a flag overrides it, and is checked.
LoRA is merged in fp32 into the base, which is as rounded as it was in training (4 bits), and the embedding rows of
<GPS n> (and <POI n>) become the vectors that the encoders gave for them; then all is cast to --dtype. Beside the model
stand its tokenizer, a card (README.md), its pointer, if it has one, and what recommend.py needs to ask it
(ga_llm.json). The folder appears whole or not at all.

Takes 4 bytes of memory for each weight, of the GPU if there is one; `CUDA_VISIBLE_DEVICES= python export.py …` takes
the machine's.
"""
import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "data-preprocess"))    # as for the scripts there

import torch  # noqa: E402

from checkins import config  # noqa: E402
from ga_llm.base import artifacts  # noqa: E402
from ga_llm.base.cli import Parser, UserError, needed, run  # noqa: E402
from ga_llm.evaluation import trained  # noqa: E402
from ga_llm.llm import backbone, pointing  # noqa: E402
from ga_llm.serving import export, gguf_file, hub, model_card, transformers_4  # noqa: E402
from ga_llm.training import checkpoints, run_log  # noqa: E402
from geo_encoder import gps_tokens, injection  # noqa: E402

log = logging.getLogger("export")


def arguments() -> tuple[argparse.Namespace, dict]:
    """The flags, and what the checkpoint was trained with (`trained.fill_in`)."""
    parser = Parser(__doc__)
    trained.add_flags(parser)
    parser.add_argument("--questions", type=Path, metavar="FILE.settings.json",
                        help="what the training's questions showed, where the checkpoint does not say it")
    parser.add_argument("--export_dir", type=Path, help="the folder to make; it must not be there")
    parser.add_argument("--gguf", choices=gguf_file.TYPES, help="also write one file for llama.cpp, with such weights")
    args = parser.parse_args()
    if args.gguf:
        needed("gguf", "--gguf")
    if not args.export_dir:
        raise UserError("--export_dir is required; see python export.py --help")
    return args, trained.fill_in(args)


def main():
    args, agreement = arguments()
    export.check_new(args.export_dir)
    injection.check_paths(args)
    checkpoint = Path(args.output_dir)
    checkpoints.require_checkpoint(checkpoint)
    dataset = config.load(artifacts.config_file(args.dataset_name), args.data_path)
    mapping = gps_tokens.read_gps_mapping(args.gps_mapping_path)
    questions = export.question_settings(checkpoint, agreement, args.questions)
    run_, metrics = export.read_run(checkpoint), export.read_metrics(checkpoint)

    dtype = args.dtype or backbone.default_dtype()
    whole = argparse.Namespace(**{**vars(args), "dtype": "float32"})
    model, tokenizer = trained.load(whole, agreement, mapping, "sdpa", to_merge=True)
    pointer = pointing.remove(model)
    context = agreement.get("model_max_length", args.context_size)
    if args.gguf:
        gguf_file.check(model.config, tokenizer, context)
    model = export.plain(model, getattr(torch, dtype))

    asked = {"model_max_length": context, "dataset": args.dataset_name, "places": mapping.digest,
             "questions": questions,
             "trajectories": {"session_time_interval": dataset.session_time_interval or export.DAY,
                              "max_current": dataset.max_current,
                              "max_current_with_history": dataset.max_current_with_history}}
    asked |= {"beside": {pointing.MODULE: agreement["beside"][pointing.MODULE]}} if pointer is not None else {}
    first = mapping.ids.argmin()
    about = model_card.Model(
        folder=args.export_dir, base=export.base_name(args.base_model), base_on_hub=hub.name_on_hub(args.base_model),
        licence=hub.licence(args.base_model, args.cache_dir), dataset=args.dataset_name,
        counts=export.read_counts(artifacts.preprocessed(args.dataset_name, args.data_path)),
        quantization=agreement.get("quantization"), rounded=whole.load_in_4bit, raw_from=dataset.raw_from,
        questions=questions, context=context, dtype=dtype,
        full=checkpoints.holds_full_model(checkpoint), trained=agreement.get("trained", []), metrics=metrics,
        flags=agreement.get("flags") or (run_ or {}).get("arguments"), step=run_log.step_of(checkpoint.resolve()),
        processes=((run_ or {}).get("machine") or {}).get("world_size"),
        encoders=["GCIM"] * bool(args.geoencoder_path) + ["PAM"] * bool(args.projector_path), places=len(mapping.ids),
        first=int(mapping.ids[first]), last=int(mapping.ids.max()), latitude=float(mapping.latitude[first]),
        longitude=float(mapping.longitude[first]),
        older=bool(transformers_4.positions(model.config.to_dict())), pointer=pointer is not None,
        alone=export.read_metrics(checkpoint / artifacts.LLM_ALONE))
    about.prefix = export.reads_prefix(tokenizer, *model_card.example(about))
    if args.gguf:
        about.gguf, about.space = gguf_file.name(args.gguf), gguf_file.needs_space(tokenizer)
    with export.new_folder(args.export_dir) as folder:
        export.save(model, tokenizer, context, folder, pointer, args.gguf)
        (folder / checkpoints.AGREEMENT).write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        (folder / model_card.README).write_text(model_card.card(about), encoding="utf-8")
    size = sum(file.stat().st_size for file in args.export_dir.iterdir())
    log.info("%.2f M weights in %s, %.1f MB", model.num_parameters() / 1e6, dtype, size / 1e6)
    print(f"wrote {args.export_dir}; {model_card.how_to_use(about, args.export_dir, args.data_path)}")


if __name__ == "__main__":
    run(main)
