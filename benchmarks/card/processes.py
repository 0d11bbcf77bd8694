"""Two processes train what one does: the losses of three steps under DDP, ZeRO-2, ZeRO-3 and FSDP2."""
import importlib.util
import json
from pathlib import Path

import torch

from card.chain import Chain
from ga_llm.base import artifacts

PART = "processes"
STACKS = {"DDP": [], "ZeRO-2": ["--deepspeed", "ds_configs/stage2.json"],
          "ZeRO-3": ["--deepspeed", "ds_configs/stage3.json"], "FSDP2": ["--fsdp", "True"]}
OFF = 1e-2      # of a loss, relatively: bf16, and another order of sums


def run(record, args) -> None:
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        return record.note(PART, "left out", "one GPU: two are needed")
    chain = Chain(args.output_dir / "processes", args.device)
    chain.sample_city()
    runs = chain.new_runs()
    reference = losses(chain, runs / "one", 1, [])
    for name, flags in STACKS.items():
        if args.toy and flags:
            record.note(PART, name, "left out of the toy run")
        elif "--deepspeed" in flags and importlib.util.find_spec("deepspeed") is None:
            record.note(PART, name, "deepspeed is not installed")
        else:
            found = losses(chain, runs / name, 2, flags)
            off = max(abs(own / one - 1) for own, one in zip(found, reference, strict=True))
            record.add(PART, f"{name}, two processes: furthest loss from one process's", off, most=OFF)


def losses(chain: Chain, output: Path, processes: int, flags) -> list[float]:
    """Of three steps of four pairs."""
    data = artifacts.preprocessed("sample", chain.folder / "datasets")
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={processes}"]
    chain.start("finetune_LLM_with_GCIM.py", "--model_name_or_path", chain.tiny_llama(), "--output_dir", output,
                "--data_path", data / artifacts.questions("train", "sample", 2, False), "--gps_mapping_path",
                data / artifacts.gps_mapping("sample"), "--model_max_length", 1024, "--bf16", True, "--load_in_4bit",
                False, "--lora_dropout", 0, "--max_steps", 3, "--save_strategy", "no", "--logging_steps", 1,
                "--per_device_train_batch_size", 4 // processes, *flags, launcher=launcher)
    log = (output / artifacts.TRAINER_LOG).read_text().splitlines()
    return [line["loss"] for line in map(json.loads, log) if "loss" in line]
