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

    On disk each process has a part, whose number is its rank: a file of records, and one of their rows of the table of
    all log-probabilities. The first process alone reads them, `read`, its own and what other runs have left.
    """
    folder: Path
    key: str                            # names what the predictions depend on; another key, another evaluation
    candidates: Sequence[int] = ()      # given: keep the table of all log-probabilities too, one column for each
    pairs: int = 0                      # rows of that table
    part: int = 0
    done: dict[int, dict] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.partial, self.rows = self._files(self.part)
        if self.part == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.read()
            if self.done:
                log.info("going on behind %d pairs that are already predicted", len(self.done))

    def _files(self, part: int | str) -> tuple[Path, Path]:
        """Where a part's records lie, and its rows."""
        return tuple(self.folder / f".{name}.{self.key}.{part}.partial" for name in (artifacts.PREDICTIONS,
                                                                                     artifacts.LOG_PROBABILITIES))

    def _parts(self) -> list[tuple[Path, Path]]:
        """Those on disk, of whatever processes."""
        numbers = {path.name.split(".")[-2] for files in self._files("*") for path in self.folder.glob(files.name)}
        return [self._files(number) for number in sorted(numbers)]

    def read(self) -> None:
        """Add what lies on disk to `done`; a record or row that was cut off is removed."""
        for partial, rows in self._parts():
            content = partial.read_bytes() if partial.exists() else b""
            lines = content[:content.rfind(b"\n") + 1].splitlines(keepends=True)
            if self.candidates:
                lines = lines[:rows.stat().st_size // self._row_bytes if rows.exists() else 0]
            try:
                self.done |= {record["pair"]: record for record in map(json.loads, lines)}
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{partial}: damaged; delete it, and its part of the evaluation starts over") from None
            for path, size in ((partial, sum(map(len, lines))), (rows, len(lines) * self._row_bytes)):
                if path.exists():
                    os.truncate(path, size)

    @property
    def _row_bytes(self) -> int:
        return np.dtype(np.float32).itemsize * len(self.candidates)

    def table(self) -> np.ndarray:
        """(pairs, candidates) log-probabilities, NaN for pairs that the protocol leaves out."""
        table = np.full((self.pairs, len(self.candidates)), np.nan, np.float32)
        for partial, rows in self._parts():
            own = [json.loads(line)["pair"] for line in partial.read_bytes().splitlines()] if partial.exists() else []
            if own:
                table[own] = np.fromfile(rows, np.float32).reshape(-1, len(self.candidates))
        return table

    def add(self, chunk: Iterable[TestPrompt], results: Iterable[Ranked]) -> None:
        """Keep the results of a chunk: on disk when this returns."""
        lines, rows = [], []
        for prompt, result in zip(chunk, results):
            if prompt.pair in self.done:
                continue
            record = {"pair": prompt.pair, "user": prompt.user, "time": prompt.time, "target": prompt.target,
                      "current": len(prompt.current), "fits": prompt.fits, **self._found(result)}
            self.done[prompt.pair] = record
            lines.append(json.dumps(record) + "\n")
            if self.candidates:
                rows.append(np.asarray(result.log_probs, np.float32).tobytes())
        if self.candidates:        # before the records: what a kill leaves of them is cut off
            writing.append(self.rows, b"".join(rows))
        writing.append(self.partial, "".join(lines))

    def check(self, test_prompts: Iterable[TestPrompt]) -> None:
        """Raises UserError if one has no prediction, as where a process has written its part elsewhere."""
        missing = sum(prompt.pair not in self.done for prompt in test_prompts)
        if missing:
            raise UserError(f"{self.folder}: other processes have predicted {missing} pairs, which are not there; give "
                            "an --output_dir that all nodes see, and start it again")

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
        """Write `report` to metrics.json, in the order of the pairs predictions.jsonl, and the table if there is one;
        they appear together.

        km: each top-1 place's distance to the true one. Returns the names of the files written. Call it last: until
        here a killed evaluation can go on.
        """
        written = [artifacts.METRICS, artifacts.PREDICTIONS, *[artifacts.LOG_PROBABILITIES] * bool(self.candidates)]
        with writing.together() as new_file:
            with new_file(self.folder / artifacts.METRICS) as file:
                json.dump(report, file, indent=2)
            with new_file(self.folder / artifacts.PREDICTIONS) as file:
                for prompt, distance in zip(test_prompts, km):
                    distance = None if np.isnan(distance) else round(float(distance), 3)
                    file.write(json.dumps({**self.done[prompt.pair], "km": distance}) + "\n")
            if self.candidates:
                table = self.table()
                with new_file(self.folder / artifacts.LOG_PROBABILITIES, "wb") as file:
                    # numpy's own `save` says of a full disk nothing that tells it from another error.
                    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(table))
                    file.write(table.data)
        for files in self._parts():
            for path in files:
                path.unlink(missing_ok=True)
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
