"""The scripts of docs/recipe.md, with stand-ins for Slurm's commands: warned, they save and queue themselves again."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from commands import FLAGS, README_FLAGS, ROOT, free_port

from ga_llm.base.artifacts import FINAL_ENCODER, TRAINER_LOG
from ga_llm.training import staging

ONE_NODE, SEVERAL = SCRIPTS = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```",
                                         (ROOT / "docs/recipe.md").read_text(encoding="utf-8"), re.S)
STEPS = 24
# The training's last two flags come from the script: how it resumes. `srun` starts two tasks and tells who they are.
STAND_INS = {
    "torchrun": 'exec "$BIN/torchrun" --nproc_per_node=1 --master_port=$PORT finetune_GCIM.py $TRAINING "${@: -2}"',
    "python": 'exec "$BIN/python" finetune_GCIM.py $TRAINING "${@: -2}"',
    "srun": """shift
        for SLURM_PROCID in 0 1; do
            export SLURM_PROCID SLURM_LOCALID=$SLURM_PROCID
            "$@" & tasks="$tasks $!"
        done
        echo $tasks > "$SLURM/tasks"
        for task in $tasks; do wait $task || exit; done""",
    "scancel": '[ "$*" = "--signal=USR1 7" ] && kill -USR1 $(cat "$SLURM/tasks")',
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$*" >> "$SLURM/queued"',
}


@pytest.fixture
def submit(repo, tmp_path):
    """submit(script): the started script, in the environment that Slurm gives it."""
    training = [*README_FLAGS, *FLAGS[1], "--output_dir", str(tmp_path / "O"), "--max_steps", str(STEPS),
                "--save_steps", str(STEPS)]
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "BIN": f"{sys.exec_prefix}/bin",
                   "SLURM": str(tmp_path), "PORT": str(free_port()), "TRAINING": " ".join(training),
                   "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}

    def start(script):
        (tmp_path / "job.sh").write_text(script)
        with open(tmp_path / "log", "a") as log:
            return subprocess.Popen(["bash", tmp_path / "job.sh"], cwd=repo, env=environment, stdout=log, stderr=log)
    return start


@pytest.mark.parametrize("script", SCRIPTS, ids=["one node", "several nodes"])
def test_they_are_bash(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    assert "#SBATCH --signal=B:USR1@" in script and "--requeue" in script


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=["one node", "several nodes"])
def test_warned_they_save_and_are_queued_again(script, submit, tmp_path):
    if script == ONE_NODE and not shutil.which("pkill"):
        pytest.skip("needs pkill")
    output, log = tmp_path / "O", tmp_path / "O" / TRAINER_LOG
    job = submit(script)
    while job.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "queued").read_text() == "requeue 7\n" and not (output / FINAL_ENCODER).exists()
    last, = staging.steps(output)
    assert 2 <= last < STEPS and f"told to stop by SIGUSR1: step {last} of {STEPS}" in (tmp_path / "log").read_text()
    if script == SEVERAL:       # two more processes need not start: what they would be told
        (tmp_path / "python").write_text('#!/bin/bash\necho "$RANK of $WORLD_SIZE: ${@: -2}"\n')
        assert submit(script).wait(300) == 0, (tmp_path / "log").read_text()
        told = sorted((tmp_path / "log").read_text().splitlines()[-2:])
        assert told == [f"{rank} of 2: --resume_from_checkpoint auto" for rank in (0, 1)]
    else:
        assert submit(script).wait(300) == 0, (tmp_path / "log").read_text()
        assert f"resuming from {output}/checkpoint-{last}" in (tmp_path / "log").read_text()
        assert (output / FINAL_ENCODER).exists()
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
