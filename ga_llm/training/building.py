"""Whatever transformers, and the packages behind its options, raise while flags are taken apart: one line."""
import contextlib
import sys

import torch
from transformers import Trainer, get_scheduler

from ga_llm.base.cli import UserError
from ga_llm.base.reading import reason


@contextlib.contextmanager
def of_flags(what: str):
    """Errors within are a UserError that begins with `what`. Of those that flags may cause, there is no list."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {reason(error)}; see python {sys.argv[0]} --help") from None


def check(args) -> None:
    """What the Trainer would find out when the model has been loaded. Raises UserError.

    Of an optimizer no more than that its package is there: some need the model.
    """
    try:
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):      # of a model that it is not for
            Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{optimizer(args)}: {reason(error)}; install that, or give another") from None
    with of_flags(schedule(args)):
        get_scheduler(args.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), args.get_warmup_steps(100), 100,
                      scheduler_specific_kwargs=args.lr_scheduler_kwargs)


def optimizer(args) -> str:
    return f"--optim {getattr(args.optim, 'value', args.optim)}" + (
        f" --optim_args {args.optim_args}" if args.optim_args else "")


def schedule(args) -> str:
    return f"--lr_scheduler_type {args.lr_scheduler_type.value}" + (
        f" --lr_scheduler_kwargs {args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else "")
