"""The options of transformers that touch labels or loss: right for our batches, or refused."""
from transformers.trainer_pt_utils import LabelSmoother

from ga_llm.base.cli import UserError


class AlignedSmoother(LabelSmoother):
    """Label smoothing of labels that stand where the token that they come after stands: nothing is shifted.

    Departure from transformers, which shifts a causal model's labels, though the collator has done so.
    """

    def __call__(self, model_output, labels, shift_labels=False, num_items_in_batch=None):
        return super().__call__(model_output, labels, num_items_in_batch=num_items_in_batch)


def check(args) -> None:
    """Raises UserError for what would train on something else than it says."""
    if args.label_smoothing_factor and getattr(args, "pointer", False):
        raise UserError("--label_smoothing_factor: would take the place of the pointer's loss; leave out one")
    if args.neftune_noise_alpha is not None and args.shared_prefix:
        raise UserError("--neftune_noise_alpha: its noise follows from a sequence's length, which a tree does not have;"
                        " leave it out, or --shared_prefix")
    if args.remove_unused_columns:
        raise UserError("--remove_unused_columns True: would remove where a pair's answer begins; leave it out")
    if args.accelerator_config.dispatch_batches:
        raise UserError("--accelerator_config: dispatch_batches cuts batches whose parts belong together; leave it out")
