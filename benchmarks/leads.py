"""What was thought of for speed and is in no preset: would it pay?

On the demo's LLM with its trimmed vocabulary, as the demo loads it (``auto``: bfloat16 where the processor multiplies
in it), each beside what there is:

- ``torch.compile`` of the decoder, for reading texts (their log-probabilities, without gradients);
- weights of the decoder's matrices in int8 (``torch.ao.quantization.quantize_dynamic`` of the model in float32), for
  reading and for writing, where there is such a thing in PyTorch;
- adapters in the upper half of the layers only (``llm.adapted_layers = 0.5``), for one pass of the update.

Checked: log-probabilities of the same texts against those in float32, as largest and mean difference in nats; how far
those of int8 are off is itself what is found. What is written, and the update, is timed and no more.
"""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from generation import demo_config, demo_llm, prompts_for, sampling
from measure import agree, arguments, finish, in_turn, peak_memory, ratio, spread
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from update import Ours, drafts_and_rewards, folder

from crosslm.models.decoding import decode
from crosslm.models.head import head_logps
from crosslm.models.llm import LLM
from crosslm.records import SyntheticSet

TOLERANCE = {"ours": 0.05, "compiled": 0.05, "int8": math.inf}
"""Mean difference in nats that is rounding; int8's must be a number."""


class Reader:
    """A decoder that reads and writes, and the head behind it."""

    def __init__(self, dtype: torch.dtype, change: Callable[[nn.Module], nn.Module] = lambda decoder: decoder) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder(True), dtype=dtype).eval().requires_grad_(False)
        self.config, self.head = model.config, model.get_output_embeddings().weight
        self.decoder = change(model.base_model)
        self.found = torch.empty(0)

    def read(self, ids: Tensor, attention: Tensor) -> None:
        """Log-probability of each token given those before it."""
        mask = attention[:, 1:].bool()
        with torch.inference_mode():
            hidden = self.decoder(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
            self.found = head_logps(hidden[:, :-1][mask], self.head, ids[:, 1:][mask])

    def write(self, prompts: list[tuple[int, ...]]) -> None:
        """A batch of texts, all to the full length."""
        decode(
            self.decoder,
            self.head,
            self.config,
            prompts,
            range(len(prompts)),
            sampling(),
            lambda _: False,
            lambda _: None,
        )


def in_int8(decoder: nn.Module) -> nn.Module:
    """Its matrices in int8; what goes in is rounded to int8 as well, row by row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.ao.quantization.quantize_dynamic(decoder, {nn.Linear}, dtype=torch.qint8)


def readers(dtype: torch.dtype) -> dict[str, Reader]:
    """What there is, and both leads."""
    sides = {
        "ours": Reader(dtype),
        "float32": Reader(torch.float32),
        "compiled": Reader(dtype, lambda decoder: torch.compile(decoder, dynamic=True)),
    }
    if hasattr(torch, "ao") and hasattr(torch.ao.quantization, "quantize_dynamic"):
        sides["int8"] = Reader(torch.float32, in_int8)
    return sides


def padded(texts: SyntheticSet) -> tuple[Tensor, Tensor]:
    """Prompts and texts as one batch."""
    rows = [torch.tensor([*sample.prompt_ids, *sample.completion_ids]) for sample in texts.samples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()


def reading_and_writing(repeats: int, batch: int) -> dict[str, Any]:
    """Compiled and int8 decoders beside ours."""
    llm = demo_llm(True, "cpu")
    texts, _ = drafts_and_rewards(llm, batch)
    ids, attention = padded(texts)
    prompts = prompts_for(llm, batch)
    sides = readers(llm.model.dtype)
    first = {}
    for name, side in sides.items():
        started = time.perf_counter()
        side.read(ids, attention)
        first[name] = round(time.perf_counter() - started, 1)
    reading = {name: lambda side=side: side.read(ids, attention) for name, side in sides.items()}
    writers = {name: lambda side=side: side.write(prompts) for name, side in sides.items() if name != "compiled"}
    times = {"read": in_turn(reading, repeats), "write": in_turn(writers, repeats)}
    exact = sides["float32"].found
    off = {name: (side.found - exact).abs() for name, side in sides.items() if name != "float32"}
    return {
        **{
            f"ratio_{name}_{what}": ratio(seconds["ours"], seconds[name])
            for what, seconds in times.items()
            for name in seconds
            if name != "ours"
        },
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "seconds": {what: {name: spread(each) for name, each in seconds.items()} for what, seconds in times.items()},
        "first_seconds": first,
        "nats_from_float32": {
            name: {"largest": round(float(one.max()), 4), "mean": round(float(one.mean()), 5)}
            for name, one in off.items()
        },
    }


def upper_half(repeats: int, count: int) -> dict[str, Any]:
    """The update with adapters everywhere, and in the upper half of the layers."""
    drafts, rewards = drafts_and_rewards(demo_llm(True, "cpu"), count)
    config = demo_config(True).llm.model_copy(update={"adapted_layers": 0.5})
    upper = LLM.load(folder(True), config, seed=0)
    sides = {"ours": Ours(demo_llm(True, "cpu"), drafts, rewards), "upper": Ours(upper, drafts, rewards)}
    seconds = in_turn({name: side.update for name, side in sides.items()}, repeats)
    return {
        "ratio_upper_half_update": ratio(seconds["ours"], seconds["upper"]),
        "trainable": {name: sum(map(Tensor.numel, side.start.values())) for name, side in sides.items()},
        "update_seconds": {name: spread(values) for name, values in seconds.items()},
    }


def main() -> None:
    """Measure all of them."""
    options = arguments(__doc__)
    repeats, batch, count = (1, 8, 8) if options.quick else (5, 64, 32)
    demo_config(True)
    figures = reading_and_writing(repeats, batch) | upper_half(repeats, count)
    mean = {name: off["mean"] for name, off in figures["nats_from_float32"].items()}
    agree({f"mean log-probability, {name}": (off, TOLERANCE[name]) for name, off in mean.items()})
    finish("leads", figures | {"batch": batch, "texts": count, "peak_bytes": peak_memory()}, options)


if __name__ == "__main__":
    main()
