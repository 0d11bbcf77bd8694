"""predictions.jsonl: written pair by pair as an evaluation goes, so that a killed one goes on where it stopped."""
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ga_llm.base import artifacts, writing
from ga_llm.base.cli import UserError
from ga_llm.evaluation.metrics import NO_POI, Ranking
from ga_llm.evaluation.ranking import Ranked
from ga_llm.pairs.spelling import TestPrompt

log = logging.getLogger(__name__)
WEIGHTS = {".safetensors", ".bin", ".pth", ".pt"}


@dataclasses.dataclass
class Store:
    """The predictions of one evaluation: `done`, {pair: record}, and on disk beside the final file until `finish`.

    A record has pair (line of the test file, from 0), user, time (the target's, local), target, current (how many
    check-ins its trajectory has before the target), fits (whether nothing was cut from the prompt), rank (null: none)
    and top, [[POI id, log-probability], …].
    """
    folder: Path
    key: str                            # names what the predictions depend on; another key, another evaluation
    candidates: Sequence[int] = ()      # given: keep the table of all log-probabilities too, one column for each
    pairs: int = 0                      # rows of that table

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.partial = self.folder / f".{artifacts.PREDICTIONS}.{self.key}.partial"
        self.table = self.folder / f".{artifacts.LOG_PROBABILITIES}.{self.key}.partial"
        self.done = {}
        if self.partial.exists() and (not len(self.candidates) or self.table.exists()):
            complete = self.partial.read_bytes().rpartition(b"\n")
            try:
                self.done = {record["pair"]: record for record in map(json.loads, complete[0].splitlines())}
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{self.partial}: damaged; delete it, and the evaluation starts over") from None
            os.truncate(self.partial, len(complete[0]) + len(complete[1]))      # a line that was cut off
        if self.done:
            log.info("going on behind %d pairs that are already predicted", len(self.done))
        else:
            self.partial.write_bytes(b"")
        if len(self.candidates):
            if not self.done:
                self._make_table()
            self.rows = np.lib.format.open_memmap(self.table, "r+")

    def _make_table(self) -> None:
        """A table of NaN, which stays where the protocol leaves pairs out."""
        try:
            with writing.naming(self.table):
                rows = np.lib.format.open_memmap(self.table, "w+", np.float32, (self.pairs, len(self.candidates)))
                with open(self.table, "rb+") as file:
                    # A disk that turns out full when the mapped memory is written kills the process (SIGBUS).
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(self.table))
            rows[:] = np.nan
        except OSError:
            self.table.unlink(missing_ok=True)
            raise

    def add(self, chunk: Iterable[TestPrompt], results: Iterable[Ranked]) -> None:
        """Keep the results of a chunk: on disk when this returns."""
        lines = []
        for prompt, result in zip(chunk, results):
            if prompt.pair in self.done:
                continue
            record = {"pair": prompt.pair, "user": prompt.user, "time": prompt.time, "target": prompt.target,
                      "current": len(prompt.current), "fits": prompt.fits, **self._found(result)}
            if len(self.candidates):
                self.rows[prompt.pair] = result.log_probs
            self.done[prompt.pair] = record
            lines.append(json.dumps(record) + "\n")
        if len(self.candidates):
            self.rows.flush()
        writing.append(self.partial, "".join(lines))

    def replace(self, test_prompts: Iterable[TestPrompt], results: Iterable[Ranked]) -> None:
        """Let other results stand for what was predicted, in memory: on disk the predictions stay until `finish`."""
        for prompt, result in zip(test_prompts, results):
            self.done[prompt.pair] |= self._found(result)

    @staticmethod
    def _found(result: Ranked) -> dict:
        return {"rank": result.rank,
                "top": [[poi, value if value is None else round(value, 4)] for poi, value in result.top]}

    def ranking(self, test_prompts: Iterable[TestPrompt]) -> Ranking:
        """The ranks and best POIs, in the order of `test_prompts`."""
        records = [self.done[prompt.pair] for prompt in test_prompts]
        return Ranking(np.array([record["rank"] or np.inf for record in records]),
                       np.array([record["top"][0][0] if record["top"] else NO_POI for record in records]))

    def finish(self, test_prompts: Iterable[TestPrompt], km: Iterable[float], report: dict) -> list[str]:
        """Write `report` to metrics.json and, in the order of the pairs, predictions.jsonl, which appear together.

        km: each top-1 place's distance to the true one. Returns the names of the files written. Call it last: until
        here a killed evaluation can go on.
        """
        written = [artifacts.METRICS, artifacts.PREDICTIONS]
        with writing.together() as new_file:
            with new_file(self.folder / artifacts.METRICS) as file:
                json.dump(report, file, indent=2)
            with new_file(self.folder / artifacts.PREDICTIONS) as file:
                for prompt, distance in zip(test_prompts, km):
                    distance = None if np.isnan(distance) else round(float(distance), 3)
                    file.write(json.dumps({**self.done[prompt.pair], "km": distance}) + "\n")
        if len(self.candidates):
            os.replace(self.table, self.folder / artifacts.LOG_PROBABILITIES)
            written.append(artifacts.LOG_PROBABILITIES)
        self.partial.unlink()
        return written


def key(settings: dict, contents: Iterable[Path | str], models: Iterable[Path | str]) -> str:
    """A short name for what predictions depend on: settings, files' contents, models' weights (by size and time)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path in contents:
        digest.update(Path(path).read_bytes())
    for path in map(Path, models):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in WEIGHTS and p.is_file())
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:12]
