"""A training that is told to stop, by SIGTERM or SIGUSR1, stops whole: after its step, with a checkpoint, exit code 0.

Slurm warns a job by a signal before it ends it. Signals may reach the processes of a training at different moments, or
one of them alone; all of them stop at the same step, because they ask each other at the end of every step. A second
signal changes nothing. SIGINT ends a process at once, as ever.

Departure from transformers' --enable_jit_checkpoint: that saves within a step (before its optimizer, so a resumed run
draws other random numbers), knows SIGTERM alone, and each process decides by itself.
"""
import logging
import signal
import sys

import torch
from transformers import TrainerCallback

from ga_llm.training import staging

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received = 0       # the number of the last signal


def listen() -> None:
    """From now on, until this process ends, SIGNALS are only noted. For the main thread."""
    global _received
    _received = 0
    for number in SIGNALS:
        signal.signal(number, _note)
        signal.siginterrupt(number, False)      # C++ code that waits for other processes knows no interruption


def end_at_once() -> None:
    """From now on they end this process, and one that has come ends it now. Exit code 0: what it trained is saved."""
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: sys.exit(0))
    if _received:
        sys.exit(0)


def _note(number: int, frame) -> None:
    global _received
    _received = number


class Preemption(TrainerCallback):
    """Lets training end early, with a checkpoint, once any process has been told to.

    signal: what it was told by, on all processes the same; stopped: whether it has left steps undone for that.
    """

    def __init__(self):
        self.signal, self.stopped = None, False

    def told(self, args) -> bool:
        """Whether any process has been told to stop. Every process must call it, for they ask each other."""
        if self.signal is None:
            number = _received
            if args.world_size > 1:
                number = torch.tensor(number, device=args.device)
                torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
                number = number.item()
            self.signal = signal.Signals(number) if number else None
        return self.signal is not None

    def before_training(self, args) -> bool:
        """Whether it is told so early that no step is begun: while the model was loaded."""
        self.stopped = self.told(args)
        return self.stopped

    def report(self, args, state) -> None:
        """Where it has stopped, if it has, and how to go on."""
        if self.stopped:
            last = staging.checkpoint(args.output_dir, state.global_step)
            log.info("told to stop by %s: %s; go on by the same command with --resume_from_checkpoint auto",
                     self.signal.name, f"step {state.global_step} of {state.max_steps} was the last, saved: {last}"
                     if state.global_step else "before the first step, so nothing is new")

    def on_step_end(self, args, state, control, **kwargs):
        """At the last step there is nothing to leave undone."""
        if self.told(args) and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            control.should_save = control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        """Told while a checkpoint was written, it takes no step more."""
        if self.told(args) and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:
            control.should_save = False     # --save_strategy epoch: it is saved already, and no epoch has ended
