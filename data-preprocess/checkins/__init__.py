"""From raw check-ins to samples and questions (paper, Section 4). No torch here.

One way through: readers → filters → splits → trajectories → encoding → mapping (all six composed by `samples`), then
`questions`. Every table is a DataFrame of check-ins in (local time, raw-file order); sorts are stable, so check-ins of
equal time keep the order of the raw file everywhere.
"""
import sys
from pathlib import Path

# The scripts beside this folder run without an installation: the repository's root holds ga_llm.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
