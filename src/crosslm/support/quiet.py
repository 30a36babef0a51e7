"""What other libraries print of themselves, and we keep from our users."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """What transformers says about a new head or a loading bar is not news to our users."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would be lines before our message
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|huggingface_hub)\..*")
