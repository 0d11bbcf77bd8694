"""PAM's projector as stage 1 trains it: by itself (finetune_PAM.py), or beside GCIM's encoder (finetune_GCIM.py)."""
import dataclasses
from typing import Literal

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.training import arguments, trainers
from geo_encoder import alignment, injection


@dataclasses.dataclass
class ProjectorArguments(arguments.SFTArguments):
    poi_embedding_path: str | None = dataclasses.field(
        default=None, metadata={"help": "<ds>_poi_embeddings.npy: row n is POI n's"})
    projector: Literal[alignment.KINDS] = dataclasses.field(
        default="linear", metadata={"help": "one linear layer, or gelu: two, with GELU between them"})
    projector_training: Literal["full", "lora"] = dataclasses.field(
        default="full", metadata={"help": "full, or lora: through LoRA alone, as in the released code"})
    llm_lora: bool = dataclasses.field(
        default=True, metadata={"help": "False: the LLM is frozen, without LoRA, as in the released code's PAM"})


def check(args: ProjectorArguments) -> None:
    """Raises UserError for flags that exclude each other, or stage 1."""
    if args.loss_on != "answer":
        raise UserError(f"--loss_on {args.loss_on}: is stage 2's; stage 1 learns what answers say of one POI; leave it "
                        "out")
    if not (args.llm_lora or args.low_rank_training):
        raise UserError("--llm_lora False, --low_rank_training False: the LLM is frozen, or all of it is trained; "
                        "leave one of them out")
    if not args.poi_embedding_path and (args.projector, args.projector_training) != ("linear", "full"):
        raise UserError("--projector, --projector_training: there is no projector without --poi_embedding_path; add it")


def new_projector(args: ProjectorArguments, setup) -> tuple[injection.Injection, trainers.Trained]:
    """A projector that has learned nothing, and its injection of the `<POI n>` of `setup`, a `common.Setup`."""
    config = alignment.ProjectorConfig(setup.model.get_input_embeddings().embedding_dim, setup.poi_embeddings.sha256)
    projector = alignment.build_projector(config.hidden_size, args.projector)
    if args.projector_training == "lora":
        projector = alignment.add_lora(projector, args.lora_r, args.lora_alpha)
    injected = injection.poi_injection(projector, setup.poi_embeddings, setup.poi_token_ids)
    injected.each = args.encode_each
    return injected, trainers.Trained(projector, config, artifacts.PAM)


def freeze_lora(llm) -> None:
    """Freeze `llm`'s LoRA, which begins at zero and so is none; transformers trains no 4-bit model without PEFT."""
    for name, parameter in llm.named_parameters():
        if "lora_" in name and not any(f"{module}." in name for module in injection.INJECTIONS.values()):
            parameter.requires_grad_(False)
