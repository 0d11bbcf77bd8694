"""Stage 2: fine-tune the LLM for next-POI prediction, with the frozen geo-encoder of stage 1 injected.

    torchrun --nproc_per_node=1 finetune_LLM_with_GCIM.py --model_name_or_path M --data_path …_llm_….json \
        --gps_mapping_path G.csv --geoencoder_path O1/N/geo_encoder_merged.pth --output_dir O …

LongLoRA: LoRA (r 8, alpha 16, dropout 0.1) on the attention's projections, embeddings and norms trained beside it,
S²-Attn while training (paper, Section 4.2). Leaves O/checkpoint-N/ for test_next_gps.py.
"""
import dataclasses
import logging

from ga_llm import arguments, artifacts, checkpoints, dry_run, llm, sharding, training
from ga_llm.cli import run
from geo_encoder import injection, weights

log = logging.getLogger("stage 2")


@dataclasses.dataclass
class Stage2Arguments(arguments.SFTArguments):
    geoencoder_path: str | None = dataclasses.field(
        default=None, metadata={"help": "geo_encoder_merged.pth of stage 1; without it <GPS n> are plain tokens"})
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    trainable_params: str = dataclasses.field(
        default="embed,norm", metadata={"help": "parameters whose name contains one of these are trained in full"})


def main():
    args = arguments.parse(Stage2Arguments)
    if args.geoencoder_path:
        artifacts.require(args.geoencoder_path, weights.MADE_BY)

    # The question-answer pairs, one <GPS n> token per place, the LLM.
    setup = training.set_up(args)
    model = setup.model

    # The frozen encoder becomes a table, looked up in the place of the <GPS n> embeddings.
    if args.geoencoder_path:
        injection.attach_frozen(model, args.geoencoder_path, setup.mapping, setup.token_ids)
    else:
        log.info("no --geoencoder_path: <GPS n> are tokens like any other")

    if args.low_rank_training:
        model = llm.add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout)
        llm.train_by_name(model, args.trainable_params)
    llm.trainable_to_fp32(model)
    log.info("training %s parameters on %d pairs", llm.describe_trainable(model), len(setup.dataset))

    trainer = checkpoints.GATrainer(model=model, args=args, train_dataset=setup.train_dataset,
                                    data_collator=setup.collator, processing_class=setup.tokenizer)
    if args.dry_run:
        dry_run.run(trainer, setup)
    else:
        checkpoints.train(trainer)
    sharding.leave(trainer.accelerator)


if __name__ == "__main__":
    run(main)
