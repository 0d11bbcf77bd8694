"""Stage 2: fine-tune the LLM for next-POI prediction, with GCIM's encoder and PAM's projector of stage 1, both frozen
(or with --train_encoders True trained on, and kept as stage 1 keeps them).

    torchrun --nproc_per_node=1 finetune_LLM_with_GCIM.py --model_name_or_path M --data_path …_llm_….json \
        --gps_mapping_path G.csv --geoencoder_path O1/N/geo_encoder_merged.pth --output_dir O … \
        [--poi_embedding_path E.npy --projector_path P1/N/poi_projector.pth]

LongLoRA: LoRA (r 8, alpha 16, dropout 0.1) on the attention's projections, embeddings and norms trained beside it,
S²-Attn while training (paper, Section 4.2). Leaves O/checkpoint-N/ for test_next_gps.py. Beyond the paper: --pointer,
--geo_output (docs/pointer.md).
"""
import dataclasses
import logging
from typing import Literal

from ga_llm.base import sharding
from ga_llm.base.cli import UserError, run
from ga_llm.llm import backbone
from ga_llm.llm.pointer import BIASES
from ga_llm.training import additions, arguments, common, dry_run, ranked, resuming, trainers
from geo_encoder import encoder, injection

log = logging.getLogger("stage 2")


@dataclasses.dataclass
class Stage2Arguments(arguments.SFTArguments):
    geoencoder_path: str | None = dataclasses.field(
        default=None, metadata={"help": "geo_encoder_merged.pth of stage 1; without it <GPS n> are plain tokens"})
    poi_embedding_path: str | None = dataclasses.field(
        default=None, metadata={"help": "POI embeddings for questions with <POI n>; needs --projector_path"})
    projector_path: str | None = dataclasses.field(
        default=None, metadata={"help": "poi_projector.pth of PAM's stage 1"})
    train_encoders: bool = dataclasses.field(
        default=False, metadata={"help": "go on training GCIM's encoder and PAM's projector, instead of freezing them"})
    pointer: bool = dataclasses.field(
        default=False, metadata={"help": "point to the prompt's check-ins by time and distance, too"})
    pointer_heads: int = 8
    pointer_without: str = dataclasses.field(
        default="", metadata={"help": "biases it lacks, to see what they are worth: " + ",".join(BIASES)})
    beside_learning_rate: float = dataclasses.field(
        default=0.0, metadata={"help": "of what has learned nothing yet beside a pretrained LLM; 0: --learning_rate"})
    geo_output: bool = dataclasses.field(
        default=False, metadata={"help": "a place's rows, input and output: own + encoder + category"})
    geo_encoder: Literal["", *encoder.KINDS] = dataclasses.field(
        default="", metadata={"help": "a new encoder, trained with the LLM, instead of --geoencoder_path"})
    dropout: float = dataclasses.field(
        default=0.0, metadata={"help": "of the embeddings and of what attention and feed-forward add, in each layer"})
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    eval_ranked: int = dataclasses.field(
        default=200, metadata={"help": "with --eval_strategy: questions ranked at the end, drawn; 0: none"})
    trainable_params: str = dataclasses.field(
        default="embed,norm", metadata={"help": "parameters whose name contains one of these are trained in full"})


def main():
    args = arguments.parse(Stage2Arguments)
    injection.check_paths(args)
    additions.check(args)

    # The question-answer pairs, one token per place, the LLM.
    setup = common.set_up(args)
    model = setup.model

    loaded = injection.load_encoders(model, setup.mapping, setup.token_ids, args.geoencoder_path,
                                     setup.poi_token_ids, setup.poi_embeddings, args.projector_path)
    if args.geo_encoder and not args.geo_output:
        loaded.append(injection.new_encoder(model, setup.mapping, setup.token_ids, args.geo_encoder))
    if args.train_encoders and not loaded:
        raise UserError("--train_encoders True: there are none; give --geoencoder_path, --projector_path, or neither")
    if not (args.geoencoder_path or args.geo_encoder):
        log.info("no --geoencoder_path: <GPS n> are tokens like any other")

    if args.low_rank_training:
        model = backbone.add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout)
        backbone.train_by_name(model, args.trainable_params)

    # In the place of the <GPS n> and <POI n> embeddings: frozen, the encoders become tables (paper).
    if args.train_encoders:
        injection.attach_trained(setup.model, loaded, args.encode_each)
        trained = [trainers.Trained(one.injection.encoder, one.config, one.files) for one in loaded]
        trainer_class, encoders = trainers.EncoderTrainer, {"trained": trained, "encoders": {}}
    else:
        trainer_class, encoders = trainers.GATrainer, {"encoders": injection.attach_encoders(setup.model, loaded)}
    additions.attach(args, setup)       # the pointer, and what else goes beyond the paper
    if args.dropout:
        backbone.add_dropout(setup.model, args.dropout)
    backbone.trainable_to_fp32(model)
    log.info("training %s parameters on %d pairs", backbone.describe_trainable(model), len(setup.dataset))

    trainer = trainer_class(model=model, args=args, train_dataset=setup.train_dataset, eval_dataset=setup.eval_dataset,
                            data_collator=setup.collator, processing_class=setup.tokenizer, **encoders)
    has_trained = False
    if args.dry_run:
        dry_run.run(trainer, setup)
    else:
        has_trained = resuming.train(trainer)
        if args.train_encoders:
            trainer.save_final_encoders(has_trained)
    sharding.leave(trainer.accelerator)
    ranked.rank(trainer, has_trained)       # with validation: Acc@1 and MRR


if __name__ == "__main__":
    run(main)
