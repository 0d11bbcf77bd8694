"""What scripts import, and what each training builds anew: once, in the process that `forked` forks the others from."""
import contextlib
import gc

import checkins.questions  # noqa: F401
import finetune_GCIM  # noqa: F401
import finetune_LLM_with_GCIM  # noqa: F401
import finetune_PAM  # noqa: F401
import make_sample_raw  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401
import test_next_gps  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401
with contextlib.suppress(ImportError):
    import peft.tuners.lora.bnb  # noqa: F401
    import transformers.integrations.bitsandbytes  # noqa: F401

get_checkpoint_conversion_mapping("llama")      # compiles a thousand patterns
gc.freeze()     # else every collection, in every process, goes through all that has been imported
