"""One arrival: where the time of a whole ``Server.step`` goes, and how much of it is not model arithmetic.

The demo's first client is served once with the demo's settings, behind the gate of its preset. Functions that do the
models' arithmetic are timed from outside; what is left of the time is overhead: sampling, tokenizing, collecting,
writing down. On a GPU sampling is part of the step that is recorded, and counts as arithmetic there.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from generation import demo_config
from measure import arguments, finish, peak_memory
from sentence_transformers import SentenceTransformer

from crosslm.client import Client
from crosslm.data.split import load_split
from crosslm.evaluate import base_texts
from crosslm.models import decoding, graph_decoding
from crosslm.models import llm as llm_module
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.llm import LLM
from crosslm.models.slm import SLM
from crosslm.models.sources import cache_folder, model_folder
from crosslm.records import Upload
from crosslm.runs.preparation import client_specs, original_llm, public_texts
from crosslm.server import Server
from crosslm.support.seeding import seed_for
from crosslm.synthesis import synthesize
from crosslm.task import Task

NOT_ARITHMETIC = ("generate: sample",)


class Clock:
    """Seconds by label, of functions that are wrapped in place."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self.device = device
        self.watched: list[tuple[Any, str, Any]] = []

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def is_recording(self) -> bool:
        """Whether a CUDA graph is being recorded: then nothing runs, and waiting for it would break the recording."""
        return self.device != "cpu" and torch.cuda.is_current_stream_capturing()

    def timed(self, function: Callable[..., Any], label: str | Callable[[], str]) -> Callable[..., Any]:
        """The function with its seconds counted."""

        def called(*values: Any, **named: Any) -> Any:
            if self.is_recording():
                return function(*values, **named)
            where = label() if callable(label) else label
            self.wait()
            started = time.perf_counter()
            try:
                return function(*values, **named)
            finally:
                self.wait()
                self.seconds[where] = self.seconds.get(where, 0.0) + time.perf_counter() - started

        return called

    def replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Put a function in the place of ``owner.name`` until :meth:`stop`."""
        self.watched.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, function)

    def watch(self, owner: Any, name: str, label: str | Callable[[], str]) -> None:
        """Time every call of ``owner.name``."""
        self.replace(owner, name, self.timed(getattr(owner, name), label))

    def stop(self) -> None:
        """Put everything back."""
        for owner, name, own in reversed(self.watched):
            if own is None:  # it was found further up, in a class
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self.watched.clear()


def llm_pass() -> str:
    """Which of the LLM's forward passes this is."""
    if torch.is_inference_mode_enabled():
        return "generate: backbone"
    return "update: forward" if torch.is_grad_enabled() else "update: reference"


def slm_pass() -> str:
    """Which of the SLM's."""
    return "slm: predict" if torch.is_inference_mode_enabled() else "slm: forward"


def watch_models(clock: Clock, server: Server, slm: SLM) -> None:
    """Time what does the models' arithmetic.

    On a GPU a step of generation is recorded and replayed (``models/graph_decoding.py``): its parts run once by
    themselves and then as one, backbone, head and sampling together.
    """
    clock.watch(server.llm.model.get_base_model().base_model, "forward", llm_pass)
    for module in (decoding, graph_decoding):
        clock.watch(module, "top_logits", "generate: head")
        clock.watch(module, "sample_tokens", "generate: sample")
    record = graph_decoding.recorded

    def recorded(step: graph_decoding.Step) -> Callable[[], None]:
        replay = record(step)
        return replay if replay is step else clock.timed(replay, "generate: recorded step")

    clock.replace(graph_decoding, "recorded", recorded)
    clock.watch(llm_module, "head_scores", "update: head")
    clock.watch(llm_module, "head_logps", "update: head")
    clock.watch(torch.Tensor, "backward", "backward of LLM and SLM")
    clock.watch(torch.optim.AdamW, "step", "optimizer")
    clock.watch(type(slm.model), "forward", slm_pass)
    clock.watch(SentenceTransformer, "forward", "select: encode")


def served(server: Server, slm: SLM, upload: Upload, device: str) -> dict[str, Any]:
    """Serve an upload, and say where the time went.

    Raises:
        SystemExit: the gate refused it, so that the LLM learned nothing.
    """
    clock = Clock(device)
    watch_models(clock, server, slm)
    try:
        clock.wait()
        started = time.perf_counter()
        _, record = server.step(upload)
        clock.wait()
        total = time.perf_counter() - started
    finally:
        clock.stop()
    if record.refusal:
        raise SystemExit(f"the step was not measured, since the gate refused it: {record.refusal}")
    arithmetic = sum(seconds for label, seconds in clock.seconds.items() if label not in NOT_ARITHMETIC)
    return {
        "overhead_fraction": round(1 - arithmetic / total, 3),
        "seconds": round(total, 1),
        "dtype": str(server.llm.model.dtype).removeprefix("torch."),
        "shares": {label: round(seconds / total, 3) for label, seconds in sorted(clock.seconds.items())},
        "texts": {"update": server.config.llm.samples, "pool": server.config.selection.pool},
        "tokens_generated": record.tokens_generated,
    }


def main() -> None:
    """Serve one client, behind the gate, as a run begins."""
    options = arguments(__doc__)
    config = demo_config(True).model_copy(update={"device": options.device})
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
    llm = LLM.load(original_llm(config, cache, print), config.llm, seed_for(config.seed, "llm"), options.device)
    encoder = SentenceEncoder(model_folder(config.selection.encoder, cache), options.device)
    spec = client_specs(config, [name])[name]
    slm = SLM.of_spec(model_folder(spec.model, cache), spec, config, 0)
    upload = Client(name, split.private[name], slm, config.slm.private, config.seed).train()
    server = Server(config, task, llm, encoder)
    base = synthesize(llm, task, config.synthesis, base_texts(config), seed_for(config.seed, "base"))
    server.begin(base, public_texts(config, print))
    finish("arrival", {**served(server, slm, upload, options.device), "peak_bytes": peak_memory()}, options)


if __name__ == "__main__":
    main()
