"""What the entry scripts share: prompts, training data, attention, loading, checkpoints, ranking, metrics."""
import importlib.util
import logging
import os
import sys

# The data folder `datasets/` beside the scripts would pass for Hugging Face's library of that name, where that is not
# installed, and its Trainer would fail on it, also if the folder is made while this runs. So this package must be
# imported before transformers.
_spec = importlib.util.find_spec("datasets")
if _spec is None or _spec.origin is None:
    sys.modules["datasets"] = None

# No pickle is executed, in whatever library: DeepSpeed asks torch.load for it. Processes started from here inherit it.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)

# On a CPU it warns, when imported, of a kernel that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# And DeepSpeed, which accelerate imports where it is installed, that there is no GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
