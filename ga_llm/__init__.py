"""What the entry scripts share: prompts, training data, attention, loading, checkpoints, ranking, metrics."""
import importlib.util
import logging
import sys

# The data folder `datasets/` beside the scripts would pass for Hugging Face's library of that name, where that is not
# installed, and its Trainer would fail on it. So this package must be imported before transformers.
_spec = importlib.util.find_spec("datasets")
if _spec is not None and _spec.origin is None:
    sys.modules["datasets"] = None

# On a CPU it warns, when imported, of a kernel that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
