"""A real result: the paper's recipe with a small LLM on a real data set, as many steps as the minutes allow."""
import json
import signal
import subprocess
import time

from card.chain import Chain
from ga_llm.base import artifacts
from ga_llm.base.cli import UserError
from ga_llm.training.staging import last_checkpoint

PART = "real"
# Of the time that is left, for steps of stage 1 and stage 2; what is not for starting and the test.
SHARES = {"stage_1": 0.05, "stage_2": 0.4}
TEST_AT_LEAST = 20          # seconds
COMMON = ["--bf16", True, "--load_in_4bit", False, "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", 20,
          "--weight_decay", 0, "--save_strategy", "steps", "--save_steps", 10**6, "--logging_steps", 5]


def run(record, args) -> None:
    chain = Chain(args.output_dir / "real", args.device)
    dataset, model, context = args.dataset_name, args.model.resolve(), args.context
    runs = chain.new_runs()
    if args.toy:
        chain.sample_city()
        dataset, model, context = "sample", chain.tiny_llama(), 1024
    else:
        prepare(chain, dataset, model)
    data = artifacts.preprocessed(dataset, chain.folder / "datasets")
    mapping = data / artifacts.gps_mapping(dataset)
    common = [*COMMON, "--model_name_or_path", model, "--gps_mapping_path", mapping]
    steps = ["--max_steps", 4] if args.toy else ["--max_steps", 10**5]

    left = record.left
    stage_1 = until(chain, left * SHARES["stage_1"], "finetune_GCIM.py", *common, *steps, "--output_dir",
                    runs / "stage1", "--data_path", data / artifacts.questions("train", dataset, 1, False),
                    "--model_max_length", 640, "--use_full_attn", True, "--lora_r", 16, "--lora_alpha", 32,
                    "--learning_rate", 5e-4, "--per_device_train_batch_size", 4 if args.toy else 64)
    encoder = runs / "stage1" / stage_1.name.rpartition("-")[2] / artifacts.MERGED_ENCODER
    stage_2 = until(chain, left * SHARES["stage_2"], "finetune_LLM_with_GCIM.py", *common, *steps, "--output_dir",
                    runs / "stage2", "--data_path", data / artifacts.questions("train", dataset, 2, False),
                    "--geoencoder_path", encoder, "--model_max_length", context, "--use_full_attn", True,
                    "--shared_prefix", True, "--loss_on", "poi_ids", "--learning_rate", args.learning_rate,
                    "--per_device_train_batch_size", 2 if args.toy else 4)
    describe_training(record, stage_1, stage_2)
    if record.left < TEST_AT_LEAST:
        return record.note(PART, "test", "no minutes left")
    chain.start("test_next_gps.py", "--base_model", model, "--output_dir", stage_2, "--dataset_name", dataset,
                "--gps_mapping_path", mapping, "--geoencoder_path", encoder, "--seq_len", context, "--context_size",
                context, "--batch_size", 32)
    describe_test(record, json.loads((stage_2 / artifacts.METRICS).read_text()))


def prepare(chain: Chain, dataset: str, model) -> None:
    """The data set's questions. Raises UserError where the model or the raw files are missing."""
    artifacts.require(model / "config.json", "python tools/get_smollm2.py")
    chain.samples(dataset)
    # Stage 1 learns where a place is, and needs no history for it.
    chain.questions(dataset, ["-fields", "coordinates,gps", "-max_history", 2], [])


def until(chain: Chain, seconds: float, script: str, *flags):
    """Train for so many seconds from the first step on, then tell the run to stop, which leaves a checkpoint: that."""
    process = chain.launch(script, *flags)
    output = flags[flags.index("--output_dir") + 1]
    while process.poll() is None and not (output / artifacts.RUN).exists():
        time.sleep(0.1)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    chain.check(script, process.wait())
    found = last_checkpoint(output)
    if found is None:
        raise UserError(f"{script}: not one step in {seconds:.0f} s; give more with --minutes")
    return found


def describe_training(record, *stages) -> None:
    for number, checkpoint in enumerate(stages, start=1):
        log = [json.loads(line) for line in (checkpoint.parent / artifacts.TRAINER_LOG).read_text().splitlines()]
        lines = [line for line in log if "loss" in line]
        if not lines:
            continue
        speed = sorted(line["tokens_per_second"] for line in lines)[len(lines) // 2]
        record.add(PART, f"stage {number}: steps", lines[-1]["step"])
        record.add(PART, f"stage {number}: epochs", lines[-1]["epoch"])
        record.add(PART, f"stage {number}: tokens/s, median", speed, "tokens/s")
        record.add(PART, f"stage {number}: loss, first and last", f"{lines[0]['loss']:.3f} {lines[-1]['loss']:.3f}")


def describe_test(record, report: dict) -> None:
    record.add(PART, "test pairs", report["n"])
    record.add(PART, "test: prompts per second", report["prompts_per_second"], "prompts/s")
    for name, summary in report["all"].items():
        for metric in ("Acc@1", "Acc@5", "MRR"):
            if metric in summary:
                value, low, high = (summary[metric][key] for key in ("value", "low", "high"))
                record.add(PART, f"{name}: {metric}, [{low:.4f}, {high:.4f}]", value)
