"""The end of stage 2 with validation: Acc@1 and MRR of its result, by test_next_gps.py on some of the questions, drawn.

A process of its own ranks, because exact ranking reads a checkpoint and not a model that is cut up among processes, and
so that the figures are those that the same command gives at any time.
"""
import gc
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.base.reading import read_json
from ga_llm.training import preemption, staging
from ga_llm.training.run_log import ROOT, RunLog, draw_log, read_log

log = logging.getLogger(__name__)

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def rank(trainer, trained: bool) -> None:
    """Rank, if it is asked for and not done yet, and log the figures. When all processes have left each other.

    trained: whether anything was, so that there are others to log to. `trainer` is spent afterwards. Raises UserError
    if the ranking fails; the training is whole then, and the same command ranks again.
    """
    args = trainer.args
    asked = args.evaluates and args.eval_ranked and not args.dry_run
    if not asked or args.process_index or trainer.preemption.stopped:
        return
    checkpoint = staging.checkpoint(args.output_dir, trainer.result_step)
    name, _ = artifacts.dataset_of(args.gps_mapping_path)
    flags = {"split": artifacts.split_of(args.eval_data_path, name), "draw": args.eval_ranked}
    results = checkpoint / artifacts.results(flags) / artifacts.METRICS
    if not results.is_file():
        release(trainer)
        preemption.end_at_once()
        command = ["test_next_gps.py", "--output_dir", str(checkpoint), "--test_file",
                   str(Path(args.eval_data_path).absolute()), "--draw", str(args.eval_ranked),
                   *(["--cache_dir", args.cache_dir] if args.cache_dir else [])]
        log.info("ranking %d validation questions: python %s", args.eval_ranked, " ".join(command))
        environment = {key: value for key, value in os.environ.items() if not key.startswith(OF_TORCHRUN)}
        # Its tables do not belong into a training's output; what it says while it works does, and its errors.
        if subprocess.run([sys.executable, ROOT / command[0], *command[1:]], env=environment,
                          stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"{checkpoint}: is whole, but its validation questions could not be ranked (see above); "
                            "try again by the same command with --resume_from_checkpoint auto, or give --eval_ranked "
                            "0")
    everyone = read_json(results)["all"]
    model, history = everyone["model"], everyone[artifacts.USER_HISTORY]
    figures = {f"eval_{metric}": model[metric]["value"] for metric in ("Acc@1", "MRR")}
    figures |= {"eval_ranked": model["n"], "eval_ranked_step": trainer.result_step}
    if any(figures.items() <= line.items() for line in read_log(Path(args.output_dir) / artifacts.TRAINER_LOG)):
        return      # an earlier start has said so
    log.info("%d validation questions ranked: %s; all metrics are in %s", model["n"], ", ".join(
        f"{metric} {model[metric]['value']:.4f} ({artifacts.USER_HISTORY}: {history[metric]['value']:.4f})"
        for metric in ("Acc@1", "MRR")), results)
    if trained:
        trainer.log(figures)
    else:
        RunLog(trainer).on_log(args, trainer.state, trainer.control, figures | {"epoch": trainer.state.epoch})
    draw_log(args.output_dir)


def release(trainer) -> None:
    """Give the memory of a GPU back, which the ranking needs: of weights and AdamW's moments, whoever holds them.

    accelerate's free_memory asks DeepSpeed, whose processes have left each other.
    """
    state = getattr(trainer.optimizer, "state", None)
    moments = [value for of_one in state.values() if isinstance(of_one, dict) for value in of_one.values()
               if isinstance(value, torch.Tensor)] if isinstance(state, dict) else []
    for tensor in (*trainer.model.parameters(), *trainer.model.buffers(), *moments):
        held = getattr(tensor, "ds_tensor", tensor)
        held = held.to_local() if isinstance(held, DTensor) else held
        if held.is_cuda:
            held.untyped_storage().resize_(0)
    gc.collect()
    torch.cuda.empty_cache()        # does nothing without one
