"""Stage 1: train the geo-encoder (GCIM), through LoRA, against an LLM that is frozen but for its own LoRA.

    torchrun --nproc_per_node=1 finetune_GCIM.py --model_name_or_path M --data_path …_stage1.json \
        --gps_mapping_path G.csv --output_dir O --lora_r 256 --lora_alpha 512 …

The LLM is asked for the coordinates of a `<GPS n>`, so the encoder learns to say in the LLM's own space where that is
(paper, Section 3.2 and 4.2). What is kept is the encoder: O/N/geo_encoder_merged.pth at every checkpoint N and
O/geo_encoder_final_merged.pth at the end. With --poi_embedding_path PAM's projector is trained and kept beside it, on
questions that show <POI n>, too.
"""
import dataclasses
import logging
import sys
from typing import Literal

from ga_llm.base import artifacts, sharding
from ga_llm.base.cli import UserError, run
from ga_llm.llm import backbone
from ga_llm.training import alignment, arguments, common, dry_run, resuming, trainers
from geo_encoder import encoder, injection

log = logging.getLogger("stage 1")


@dataclasses.dataclass
class Stage1Arguments(alignment.ProjectorArguments):
    lora_r: int = dataclasses.field(default=256, metadata={"help": "rank, of the LLM's LoRA and of the encoder's"})
    lora_alpha: int = 512
    encoder_training: Literal["lora", "released", "full"] = dataclasses.field(
        default="lora", metadata={"help": "LoRA; released: where the released code's LoRA is; full: all of it"})
    geo_encoder: Literal[encoder.KINDS] = dataclasses.field(default="hierarchical", metadata={"help": "which one"})
    ngram: int = encoder.NGRAM
    quadkey_level: int = encoder.LEVEL


def main():
    args = arguments.parse(Stage1Arguments)
    alignment.check(args)
    try:
        config = encoder.GeoEncoderConfig(1, args.geo_encoder, args.ngram, args.quadkey_level)
    except ValueError as error:
        raise UserError(f"--geo_encoder, --ngram, --quadkey_level: {error}; see python {sys.argv[0]} --help") from None

    # The question-answer pairs, one <GPS n> token per place, the LLM.
    setup = common.set_up(args)

    # The encoder, with LoRA of its own, in the place of the <GPS n> embeddings.
    config = dataclasses.replace(config, hidden_size=setup.model.get_input_embeddings().embedding_dim)
    lora = (args.lora_r, args.lora_alpha) if args.encoder_training != "full" else None
    targets = encoder.RELEASED_TARGETS if args.encoder_training == "released" else encoder.LORA_TARGETS
    injected = injection.new_gps_injection(config, setup.mapping, setup.token_ids, lora, targets)
    injected.each = args.encode_each
    trained = [trainers.Trained(injected.encoder, config)]
    if args.poi_embedding_path:     # PAM's projector beside it, in the place of the <POI n> embeddings
        of_poi, projector = alignment.new_projector(args, setup)
        trained.append(projector)
    model = common.for_stage_1(setup.model, injected, args.lora_r, args.lora_alpha, args.low_rank_training)
    if args.poi_embedding_path:
        injection.attach(setup.model, of_poi, injection.INJECTIONS[artifacts.PAM])
    if not args.llm_lora:
        alignment.freeze_lora(model)
    log.info("training %s parameters on %d pairs", backbone.describe_trainable(model), len(setup.dataset))

    trainer = trainers.EncoderTrainer(model=model, args=args, train_dataset=setup.train_dataset,
                                      eval_dataset=setup.eval_dataset, data_collator=setup.collator,
                                      processing_class=setup.tokenizer, trained=trained)
    if args.dry_run:
        dry_run.run(trainer, setup)
    else:
        trainer.save_final_encoders(resuming.train(trainer))
    sharding.leave(trainer.accelerator)


if __name__ == "__main__":
    run(main)
