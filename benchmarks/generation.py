"""Generation: ``LLM.generate`` against ``model.generate`` of transformers.

Both write one batch from the demo's prompts with top-k 50, top-p 0.95, temperature 1 and at most 32 new tokens. A token
counts if it is kept: the tokens up to the end of the text, which is the end-of-sequence token or a stop string.
``model.generate`` is that of the plain model, without an adapter, and knows the end-of-sequence token; a stop string
would not help it, since it samples on until the last of its rows has ended. What it wrote after an end is not kept.

Ours runs with the dtype of the demo's configuration (``auto``: bfloat16 where the processor multiplies in it) and in
float32; transformers in float32, as it loads the model, and, for comparison, in the same dtype as ours.

A run writes 256 texts at a time by itself (``synthesis.batch_size``); of four times the batch there is our rate alone.

Checked: with top-k 1 both write the same tokens in float32, in 95 of 100 texts at least (a tie may be rounded either
way); with top-k 50 the kept tokens are equally likely under the model in float32, whatever wrote them: their mean
log-probabilities differ by half a nat at most, most of it chance.
"""

import statistics
import time
from typing import Any

import torch
from measure import agree, arguments, finish, in_turn, matrix_rate, peak_memory, ratio, spread
from transformers import AutoModelForCausalLM

from crosslm.config import Config, SynthesisConfig
from crosslm.config_file import load
from crosslm.data.demo import prepare_data
from crosslm.models.llm import LLM
from crosslm.models.sources import cache_folder
from crosslm.runs.preparation import original_llm
from crosslm.task import Task

NEW_TOKENS = 32


def demo_config(vocabulary: bool) -> Config:
    """The demo's configuration, with its trimmed vocabulary or the whole one."""
    cache = cache_folder()
    whole = () if vocabulary else ("llm.vocabulary_texts=[]",)
    return load("demo", whole, str(prepare_data(cache)))


def demo_llm(vocabulary: bool, device: str, dtype: str = "auto") -> LLM:
    """The demo's LLM before it learns anything."""
    config = demo_config(vocabulary)
    llm = config.llm.model_copy(update={"dtype": dtype})
    return LLM.load(original_llm(config, cache_folder(), print), llm, seed=0, device=device)


def prompts_for(llm: LLM, batch: int) -> list[tuple[int, ...]]:
    """A batch of label prompts: all of the demo's, in turn."""
    task = Task.from_config(demo_config(False).task)
    prompts = [prompt for label in task.prompts for prompt in label]
    return [tuple(llm.encode(prompts[row % len(prompts)])) for row in range(batch)]


def sampling(top_k: int = 50) -> SynthesisConfig:
    """How both sides sample."""
    return SynthesisConfig(top_k=top_k, top_p=0.95, temperature=1.0, max_new_tokens=NEW_TOKENS)


def kept(llm: LLM, row: list[int], stops: tuple[str, ...]) -> list[int]:
    """The tokens of a row up to the one that ends the text."""
    for place, token in enumerate(row):
        if token in llm.end_ids or any(stop in llm.tokenizer.decode(row[: place + 1]) for stop in stops):
            return row[: place + 1]
    return row


class Side:
    """One way to write the same batch, and what it has written."""

    def __init__(self, llm: LLM, prompts: list[tuple[int, ...]]) -> None:
        self.llm, self.prompts = llm, prompts
        self.seed = 0
        self.tokens: list[int] = []
        self.rows: list[list[int]] = []

    def write(self, top_k: int = 50) -> float:
        """``LLM.generate``; its seconds."""
        self.seed += 1
        seeds = range(self.seed * 1000, self.seed * 1000 + len(self.prompts))
        started = time.perf_counter()
        rows = self.llm.generate(self.prompts, seeds, sampling(top_k))
        seconds = time.perf_counter() - started
        self.keep(rows)
        return seconds

    def keep(self, rows: list[list[int]]) -> None:
        """Remember the texts and count their tokens."""
        self.rows = rows
        self.tokens.append(sum(map(len, rows)))


class Generate(Side):
    """``model.generate`` of transformers, on the plain model."""

    def __init__(self, llm: LLM, prompts: list[tuple[int, ...]], folder: str, dtype: torch.dtype) -> None:
        super().__init__(llm, prompts)
        longest = max(map(len, self.prompts))
        self.ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        for row, prompt in enumerate(self.prompts):
            self.ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, longest - len(prompt) :] = 1
        self.ids, self.mask = self.ids.to(llm.device), self.mask.to(llm.device)
        self.plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(llm.device).eval()

    def write(self, top_k: int = 50) -> float:
        """Its seconds, without finding out which tokens are kept."""
        torch.manual_seed(self.seed)
        self.seed += 1
        how: dict[str, Any] = {"do_sample": True, "top_k": top_k, "top_p": 0.95, "temperature": 1.0}
        started = time.perf_counter()
        with torch.inference_mode():
            written = self.plain.generate(
                input_ids=self.ids,
                attention_mask=self.mask,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=self.llm.tokenizer.eos_token_id,
                **how,
            )
        rows = written[:, self.ids.shape[1] :].tolist()
        seconds = time.perf_counter() - started
        self.keep([kept(self.llm, row, sampling().stop) for row in rows])
        return seconds


def mean_logp(judge: LLM, side: Side) -> float:
    """Mean log-probability under ``judge`` of a kept token of the last batch, whose vocabulary may be a trimmed one."""
    names, judged = side.llm.tokenizer.convert_ids_to_tokens, judge.tokenizer.convert_tokens_to_ids
    sequences = [judged(names([*prompt, *row])) for prompt, row in zip(side.prompts, side.rows, strict=True)]
    with torch.no_grad():
        logps, _ = judge.logps(sequences)
    kept_logps = [
        row[len(prompt) - 1 : len(prompt) - 1 + len(text)]
        for row, prompt, text in zip(logps, side.prompts, side.rows, strict=True)
    ]
    return float(torch.cat(kept_logps).mean())


def same_tokens(one: Side, other: Side) -> float:
    """Share of texts that are token for token the same when both take the likeliest token."""
    one.write(top_k=1)
    other.write(top_k=1)
    return sum(ours == theirs for ours, theirs in zip(one.rows, other.rows, strict=True)) / len(one.prompts)


def limit(llm: LLM, device: str) -> float:
    """Tokens a second if there were nothing to do but the matrix products of one token each."""
    model = llm.model.get_base_model()
    vocabulary, width = model.get_output_embeddings().weight.shape
    body = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "embed_tokens" not in name and "lora" not in name
    )
    return matrix_rate(device) / (2 * (body + vocabulary * width))


def main() -> None:
    """Measure all sides in turn."""
    options = arguments(__doc__, batch={"type": int, "default": 64})
    repeats, batch, device = (1, 16, options.device) if options.quick else (3, options.batch, options.device)
    folder = original_llm(demo_config(False), cache_folder(), print)
    llms = [
        demo_llm(vocabulary, device, dtype)
        for vocabulary, dtype in ((False, "float32"), (False, "auto"), (True, "auto"))
    ]
    exact, ours, trimmed = (Side(llm, prompts_for(llm, batch)) for llm in llms)
    sides = {
        "hf": Generate(exact.llm, exact.prompts, folder, torch.float32),
        "ours": ours,
        "ours_float32": exact,
        "trimmed": trimmed,
        "hf_same_dtype": Generate(exact.llm, exact.prompts, folder, ours.llm.model.dtype),
    }
    same = {"float32": same_tokens(exact, sides["hf"]), "ours": same_tokens(ours, sides["hf"])}
    for side in sides.values():
        side.tokens = []
    seconds = in_turn({name: side.write for name, side in sides.items()}, repeats)
    rates = {
        name: [count / second for count, second in zip(sides[name].tokens[1:], values, strict=True)]
        for name, values in seconds.items()
    }
    limits = {"ours": limit(ours.llm, device), "trimmed": limit(trimmed.llm, device)}
    many = Side(trimmed.llm, prompts_for(trimmed.llm, 4 * batch))
    many_seconds = in_turn({"many": many.write}, repeats)["many"]
    many_rates = [count / second for count, second in zip(many.tokens[1:], many_seconds, strict=True)]
    sides |= {"trimmed_many": many}
    figures = {
        "ratio_vs_hf_generate": ratio(rates["ours"], rates["hf"]),
        "ratio_vs_hf_generate_trimmed": ratio(rates["trimmed"], rates["hf"]),
        "ratio_vs_hf_generate_float32": ratio(rates["ours_float32"], rates["hf"]),
        "ratio_vs_hf_generate_same_dtype": ratio(rates["ours"], rates["hf_same_dtype"]),
        "fraction_of_limit": round(statistics.median(rates["ours"]) / limits["ours"], 3),
        "fraction_of_limit_trimmed": round(statistics.median(rates["trimmed"]) / limits["trimmed"], 3),
        f"fraction_of_limit_trimmed_{4 * batch}": round(statistics.median(many_rates) / limits["trimmed"], 3),
        "dtype": str(ours.llm.model.dtype).removeprefix("torch."),
        "tokens_per_second": {name: spread(values) for name, values in rates.items()},
        "tokens_kept": {name: spread([float(count) for count in side.tokens[1:]]) for name, side in sides.items()},
        "limit_tokens_per_second": {name: round(value, 1) for name, value in limits.items()},
        "vocabulary": {"whole": len(ours.llm.tokenizer), "trimmed": len(trimmed.llm.tokenizer)},
        "same_greedy_texts": same,
        "mean_logp": {name: round(mean_logp(exact.llm, sides[name]), 3) for name in sides},
        "batch": batch,
        "new_tokens": NEW_TOKENS,
        "peak_bytes": peak_memory(),
    }
    others = {name: abs(figures["mean_logp"]["hf"] - value) for name, value in figures["mean_logp"].items()}
    unlike = {"share of texts that differ with top-k 1 in float32": (1 - same["float32"], 0.05)}
    agree(unlike | {f"mean log-probability, {name}": (found, 0.5) for name, found in others.items()})
    finish("generation", figures, options)


if __name__ == "__main__":
    main()
