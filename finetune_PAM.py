"""Stage 1 of PAM: train the projector of POI embeddings, against an LLM that is frozen but for its own LoRA.

    torchrun --nproc_per_node=1 finetune_PAM.py --model_name_or_path M --data_path train_qa_pairs_<ds>_pam.json \
        --gps_mapping_path G.csv --poi_embedding_path <ds>_poi_embeddings.npy --output_dir O --lora_r 256 …

The LLM is asked for the id, the category and the successors of a `<POI n>`, so the projector learns to say in the LLM's
own space what the embedding knows (paper, Section 3.3 and 4.2). What is kept is the projector: O/N/poi_projector.pth at
every checkpoint N and O/poi_projector_final.pth at the end.
"""
import dataclasses
import logging

from ga_llm.base import artifacts, sharding
from ga_llm.base.cli import run
from ga_llm.llm import backbone
from ga_llm.training import alignment, arguments, common, dry_run, resuming, trainers

log = logging.getLogger("PAM")


@dataclasses.dataclass
class PAMArguments(alignment.ProjectorArguments):
    lora_r: int = dataclasses.field(default=256, metadata={"help": "rank of the LLM's LoRA, and of the projector's"})
    lora_alpha: int = 512


def main():
    args = arguments.parse(PAMArguments, required=("poi_embedding_path",))
    alignment.check(args)

    # The questions, one <POI n> token per place, the LLM.
    setup = common.set_up(args)

    # The projector, in the place of the <POI n> embeddings.
    injected, projector = alignment.new_projector(args, setup)
    model = common.for_stage_1(setup.model, injected, args.lora_r, args.lora_alpha, args.low_rank_training,
                               artifacts.PAM)
    if not args.llm_lora:
        alignment.freeze_lora(model)
    log.info("training %s parameters on %d pairs", backbone.describe_trainable(model), len(setup.dataset))

    trainer = trainers.EncoderTrainer(model=model, args=args, train_dataset=setup.train_dataset,
                                      eval_dataset=setup.eval_dataset, data_collator=setup.collator,
                                      processing_class=setup.tokenizer, trained=[projector])
    if args.dry_run:
        dry_run.run(trainer, setup)
    else:
        trainer.save_final_encoders(resuming.train(trainer))
    sharding.leave(trainer.accelerator)


if __name__ == "__main__":
    run(main)
