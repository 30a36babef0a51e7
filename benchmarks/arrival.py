"""One arrival: where the time of a whole ``Server.step`` goes, and how much of it is not model arithmetic.

The demo's first client is served once with the demo's settings. Functions that do the models' arithmetic are timed from
outside; what is left of the step's time is overhead: sampling, tokenizing, collecting, writing down.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from generation import demo_config
from measure import arguments, finish, peak_memory
from sentence_transformers import SentenceTransformer

from crosslm.client import Client
from crosslm.models import decoding
from crosslm.models import llm as llm_module
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, model_folder
from crosslm.preparation import client_specs, original_llm
from crosslm.seeding import seed_for
from crosslm.server import Server
from crosslm.split import load_split
from crosslm.task import Task

NOT_ARITHMETIC = ("generate: sample",)


class Clock:
    """Seconds by label, of functions that are wrapped in place."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self.device = device

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def watch(self, owner: Any, name: str, label: str | Callable[[], str]) -> None:
        """Time every call of ``owner.name``."""
        function = getattr(owner, name)

        def timed(*values: Any, **named: Any) -> Any:
            where = label() if callable(label) else label
            self.wait()
            started = time.perf_counter()
            try:
                return function(*values, **named)
            finally:
                self.wait()
                self.seconds[where] = self.seconds.get(where, 0.0) + time.perf_counter() - started

        setattr(owner, name, timed)


def llm_pass() -> str:
    """Which of the LLM's forward passes this is."""
    if torch.is_inference_mode_enabled():
        return "generate: backbone"
    return "update: forward" if torch.is_grad_enabled() else "update: reference"


def slm_pass() -> str:
    """Which of the SLM's."""
    return "slm: predict" if torch.is_inference_mode_enabled() else "slm: forward"


def main() -> None:
    """Serve one client."""
    options = arguments(__doc__)
    config = demo_config(True)
    if options.quick:
        config = config.model_copy(
            update={
                "llm": config.llm.model_copy(update={"samples": 16}),
                "selection": config.selection.model_copy(update={"pool": 48}),
                "slm": config.slm.model_copy(update={"private": config.slm.private.model_copy(update={"epochs": 1})}),
            }
        )
    task, cache, split = Task.from_config(config.task), cache_folder(), load_split(config)
    name = next(iter(split.private))
    spec = client_specs(config, [name])[name]
    llm = LLM.load(original_llm(config, cache, print), config.llm, seed_for(config.seed, "llm"), options.device)
    encoder = SentenceEncoder(model_folder(config.selection.encoder, cache), options.device)
    folder, length = model_folder(spec.model, cache), config.slm.max_length
    frozen = config.slm.freeze_embeddings
    slm = SLM.load(folder, task.labels, length, 0, spec.num_hidden_layers, frozen, options.device, spec.pooling)
    upload = Client(name, split.private[name], slm, config.slm.private, config.seed).train()
    server = Server(config.model_copy(update={"device": options.device}), task, llm, encoder)

    clock = Clock(options.device)
    clock.watch(llm.model.get_base_model().base_model, "forward", llm_pass)
    clock.watch(decoding, "top_logits", "generate: head")
    clock.watch(decoding, "sample_tokens", "generate: sample")
    clock.watch(llm_module, "head_scores", "update: head")
    clock.watch(llm_module, "head_logps", "update: head")
    clock.watch(torch.Tensor, "backward", "backward of LLM and SLM")
    clock.watch(torch.optim.AdamW, "step", "optimizer")
    clock.watch(type(slm.model), "forward", slm_pass)
    clock.watch(SentenceTransformer, "forward", "select: encode")
    started = time.perf_counter()
    _, record = server.step(upload)
    total = time.perf_counter() - started

    arithmetic = sum(seconds for label, seconds in clock.seconds.items() if label not in NOT_ARITHMETIC)
    shares = {label: round(seconds / total, 3) for label, seconds in sorted(clock.seconds.items())}
    figures = {
        "overhead_fraction": round(1 - arithmetic / total, 3),
        "seconds": round(total, 1),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "shares": shares,
        "texts": {"update": config.llm.samples, "pool": config.selection.pool},
        "tokens_generated": record.tokens_generated,
        "peak_bytes": peak_memory(),
    }
    finish("arrival", figures, options)


if __name__ == "__main__":
    main()
