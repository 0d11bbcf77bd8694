"""Steps run once: what is in their key, what a second run does, what a failure and a kill leave."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest

from ga_llm.base.cli import UserError
from ga_llm.tables import chain
from ga_llm.tables.chain import LAST_CHECKPOINT, OWN, Made, Step

WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1], 'a').write_text(sys.argv[2]); print('said')"
COPIES = "import sys, shutil; shutil.copy(sys.argv[1], sys.argv[2])"


@pytest.fixture
def script(tmp_path):
    def make(name, source):
        path = tmp_path / f"{name}.py"
        path.write_text(f"import sys, pathlib\npathlib.Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)\n{source}")
        return str(path)
    return make


def two(tmp_path, script, text="x", reads=()):
    one = Step("one", ("python", script("one", WRITES), OWN, text), tmp_path / "steps", (), tuple(reads))
    other = Step("two", ("python", script("two", "import shutil; shutil.copy(sys.argv[2], sys.argv[1])"), OWN,
                         Made(one, "a")), tmp_path / "steps")
    return one, other


def run_all(last):
    for step in chain.in_order(last):
        step.run()


def test_a_chain_runs_in_order_and_tells_what_it_did(tmp_path, script):
    one, other = two(tmp_path, script)
    assert chain.in_order(other) == [one, other]
    run_all(other)
    assert (other.out / "a").read_text() == "x"
    log = (one.folder / chain.LOG).read_text()
    assert log.startswith("$ python ") and log.endswith("said\n")
    written = json.loads((other.folder / chain.DONE).read_text())
    assert written["steps"] == [one.id] and written["key"] == other.key and written["seconds"] >= 0
    assert written["command"].split()[-1] == str(one.out / "a") and written["machine"] and written["started"]


def test_a_second_run_runs_nothing(tmp_path, script, monkeypatch):
    run_all(two(tmp_path, script)[1])
    monkeypatch.setattr(chain, "_call", lambda *args: pytest.fail("must not run"))
    run_all(two(tmp_path, script)[1])


def test_the_key_changes_with_each_input_and_with_nothing_else(tmp_path, script):
    raw, config, model = tmp_path / "raw.csv", tmp_path / "conf.yml", tmp_path / "model"
    raw.write_text("1"), config.write_text("a: 1")
    model.mkdir()
    (model / "config.json").write_text("{}"), (model / "model.safetensors").write_bytes(b"12345678")

    def keys(flag="5", root="steps"):
        before = Step("samples", ("python", "s.py", "-f", str(config), OWN), tmp_path / root, (), (raw,))
        linked = Step("linked", ("python", "q.py", OWN), tmp_path / root, ((Made(before), "."),))
        after = Step("train", ("torchrun", "t.py", "--model", str(model), "--steps", flag, "--data",
                               Made(linked, "x.json")), tmp_path / root)
        return [step.key for step in (before, linked, after)]

    first = keys()
    assert len(set(first)) == 3 and keys() == first and keys(root="elsewhere") == first
    # A file's contents count, not when it was written.
    os.utime(raw, ns=(1, 1))
    assert keys() == first
    assert [a == b for a, b in zip(keys("6"), first)] == [True, True, False]
    (model / "notes.md").write_text("of no account")
    assert keys() == first
    for path, content, same in ((model / "model.safetensors", "12345679", [True, True, False]),
                                (model / "tokenizer.json", "{}", [True, True, False]),
                                (raw, "2", [False] * 3), (config, "a: 2", [False] * 3)):
        before = keys()
        path.write_text(content)
        assert [a == b for a, b in zip(keys(), before)] == same, path
    # A model's folder may have another name: it is what it holds that counts.
    before = keys()
    model = model.rename(tmp_path / "renamed")
    assert keys() == before
    # The order of the files that are read does not count, and code is not in the key.
    (tmp_path / "s.py").write_text("print()")
    assert keys() == before


def test_a_changed_step_reruns_those_behind_it_alone(tmp_path, script):
    first = two(tmp_path, script)
    run_all(first[1])
    changed = two(tmp_path, script, text="y")
    assert [step.done for step in changed] == [False, False]
    run_all(changed[1])
    assert (changed[1].out / "a").read_text() == "y" and (first[1].out / "a").read_text() == "x"
    assert all(step.done for step in (*first, *changed)) and len(list((tmp_path / "steps").iterdir())) == 4


def test_a_failure_names_step_log_and_command_and_is_run_again(tmp_path, script):
    path = script("fails", "print('error: file.csv: is wrong; mend it', file=sys.stderr); sys.exit(2)")
    step = Step("fails", ("python", path, OWN, "a b"), tmp_path / "steps")
    with pytest.raises(UserError) as raised:
        step.run()
    text = str(raised.value)
    assert text.startswith(f"{step.id}: failed with exit code 2 after 0 s: file.csv: is wrong; mend it; see ")
    assert str(step.folder / chain.LOG) in text and text.endswith(f"{step.out} 'a b'`") and "\n" not in text
    assert not step.done
    script("fails", "")
    step.run()
    assert step.done and (step.folder / chain.LOG).read_text().count("$ python") == 2


@pytest.mark.parametrize("log, words", [
    ("$ c\n", "it said nothing"),
    ("$ c\nerror: old; x\n$ c\nTraceback\n[rank0]: ValueError: no\n====\ntorch.distributed.elastic.multiprocessing."
     "errors.ChildFailedError:\n------\nexitcode: 1\n======\n", "ValueError: no"),
    ("$ c\nValueError: a\nerror: b; c.\nmore\n", "b; c"),
    ("$ c\nsomething\nKilled\n====\n", "Killed")])
def test_last_words(tmp_path, log, words):
    (tmp_path / "log").write_text(log)
    assert chain._last_words(tmp_path / "log") == words


def test_what_a_step_should_have_left_is_missed(tmp_path, script):
    one = Step("one", ("python", script("one", ""), OWN), tmp_path / "steps")
    other = Step("two", ("python", script("two", ""), OWN, Made(one, "a")), tmp_path / "steps")
    with pytest.raises(UserError, match=f"{one.id} has left none; move .* away"):
        run_all(other)
    assert one.done and not other.folder.joinpath(chain.DONE).exists()


def test_links_are_files_of_ones_own(tmp_path, script):
    one, _ = two(tmp_path, script)
    replace = ("p = pathlib.Path(sys.argv[1], 'in', 'a'); t = p.with_name('t'); t.write_text(p.read_text() + '!'); "
               "t.replace(p)")
    other = Step("two", ("python", script("two", replace), OWN), tmp_path / "steps", ((Made(one), "in"),))
    one.run()
    (one.out / "tokens-1").mkdir(), (one.out / ".lock").touch()
    run_all(other)
    assert (one.out / "a").read_text() == "x" and (other.out / "in/a").read_text() == "x!"
    assert [path.name for path in (other.out / "in").iterdir()] == ["a"]


def test_the_last_checkpoint(tmp_path, script):
    make = "[pathlib.Path(sys.argv[1], f'checkpoint-{n}').mkdir() for n in (9, 10)]"
    step = Step("train", ("python", script("train", make), OWN), tmp_path / "steps")
    last = Made(step, LAST_CHECKPOINT)
    assert last.shown() == f"$(ls -dv {step.out}/checkpoint-* | tail -1)"
    step.run()
    assert last.path == step.out / "checkpoint-10" and last.shown() == str(last.path)


def test_the_plan_can_be_pasted(tmp_path, script):
    """The printed commands, run by a shell, make what the chain makes."""
    one, _ = two(tmp_path, script, text="it's $HOME")
    other = Step("two", ("python", script("two", "p = pathlib.Path(sys.argv[1], 'in/a'); p.rename(p.with_name('b'))"),
                         OWN), tmp_path / "steps", ((Made(one), "in"),))
    text = chain.plan(chain.in_order(other))
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == [f"# {one.id}: to do", f"# {other.id}: to do"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", text], check=True, env=environment, capture_output=True)
    assert (other.out / "in/b").read_text() == "it's $HOME" and not one.done


def test_two_at_once_run_it_once(tmp_path, script):
    """The second waits for the first, and finds the step done."""
    path = script("slow", "import time; time.sleep(0.5); open(pathlib.Path(sys.argv[1], 'runs'), 'a').write('x')")
    run = tmp_path / "run.py"
    run.write_text("import pathlib; from ga_llm.tables.chain import Step, OWN; "
                   f"Step('slow', ('python', {path!r}, OWN), pathlib.Path('steps')).run()")
    both = [forked.launch(tmp_path, [run], tmp_path / "log") for _ in range(2)]
    assert [forked.end(process, tmp_path / "log").code for process in both] == [0, 0]
    runs, = (tmp_path / "steps").glob("slow-*/out/runs")
    assert runs.read_text() == "x" and not list(tmp_path.glob("steps/*/.lock"))


def test_stopped_it_stops_its_command_and_goes_on_when_run_again(tmp_path, script):
    """SIGTERM in the middle: the command is stopped too, nothing is done; the next run ends what the first began."""
    path = script("long", "f = pathlib.Path(sys.argv[1], 'pid')\nimport os, time\nif not f.exists():\n"
                          "    f.write_text(str(os.getpid())); time.sleep(60)")
    step = Step("long", ("python", path, OWN), tmp_path / "steps")

    def stop():
        while not (step.out / "pid").is_file() or not (step.out / "pid").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        step.run()
    with pytest.raises(ProcessLookupError):
        os.kill(int((step.out / "pid").read_text()), 0)
    assert not step.done
    step.run()
    assert step.done


def test_a_training_that_was_told_to_stop_is_not_done(tmp_path, monkeypatch):
    """It ends with 0, too; run again it goes on."""
    step = Step("gcim", ("torchrun", "finetune_GCIM.py", OWN), tmp_path / "steps")
    came_to = iter([None, 3, 6])

    def call(command, log_file):
        reached = next(came_to)
        if reached:
            (step.out / f"checkpoint-{reached}").mkdir(parents=True)
            (step.out / f"checkpoint-{reached}/trainer_state.json").write_text(json.dumps(
                {"global_step": reached, "max_steps": 6, "num_train_epochs": 1, "log_history": []}))
        return 0

    monkeypatch.setattr(chain, "_call", call)
    for when in ("early", "after step 3"):
        with pytest.raises(UserError, match=f"told to stop {when}, see .*log.txt; run it again, and it goes on"):
            step.run()
        assert not step.done
    step.run()
    assert step.done
