"""Generation: ``LLM.generate`` against ``model.generate`` of transformers.

Both write one batch from the demo's prompts with top-k 50, top-p 0.95, temperature 1 and at most 32 new tokens. A token
counts if it is kept: the tokens up to the end of the text, which is the end-of-sequence token or a stop string.
``model.generate`` is that of the plain model, without an adapter, and knows the end-of-sequence token; a stop string
would not help it, since it samples on until the last of its rows has ended. What it wrote after an end is not kept.

Checked: with top-k 1 both write the same tokens; with top-k 50 the kept tokens are equally likely under the model.
"""

import statistics
import time
from typing import Any

import torch
from measure import arguments, finish, in_turn, matrix_rate, peak_memory, ratio, spread
from transformers import AutoModelForCausalLM

from crosslm.config import Config, SynthesisConfig
from crosslm.config_file import load
from crosslm.demo import prepare_data
from crosslm.models.llm import LLM
from crosslm.models.sources import cache_folder
from crosslm.preparation import original_llm
from crosslm.task import Task

NEW_TOKENS = 32


def demo_config(vocabulary: bool) -> Config:
    """The demo's configuration, with its trimmed vocabulary or the whole one."""
    cache = cache_folder()
    whole = () if vocabulary else ("llm.vocabulary_texts=[]",)
    return load("demo", whole, str(prepare_data(cache)))


def demo_llm(vocabulary: bool, device: str) -> LLM:
    """The demo's LLM before it learns anything."""
    config = demo_config(vocabulary)
    return LLM.load(original_llm(config, cache_folder(), print), config.llm, seed=0, device=device)


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


class Sides:
    """The two ways to write the same batch."""

    def __init__(self, llm: LLM, batch: int, folder: str) -> None:
        self.llm, self.prompts, self.seed = llm, prompts_for(llm, batch), 0
        longest = max(map(len, self.prompts))
        self.ids = torch.zeros(batch, longest, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        for row, prompt in enumerate(self.prompts):
            self.ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, longest - len(prompt) :] = 1
        self.ids, self.mask = self.ids.to(llm.device), self.mask.to(llm.device)
        self.plain = AutoModelForCausalLM.from_pretrained(folder).to(llm.device).eval()
        self.tokens: dict[str, list[int]] = {"ours": [], "hf": []}
        self.rows: dict[str, list[list[int]]] = {}

    def ours(self, top_k: int = 50) -> None:
        """``LLM.generate``."""
        self.seed += 1
        seeds = range(self.seed * 1000, self.seed * 1000 + len(self.prompts))
        self._count("ours", self.llm.generate(self.prompts, seeds, sampling(top_k)))

    def hf(self, top_k: int = 50) -> float:
        """``model.generate``; its seconds, without finding out which tokens are kept."""
        torch.manual_seed(self.seed)
        started = time.perf_counter()
        how: dict[str, Any] = {"do_sample": True, "top_k": top_k, "top_p": 0.95, "temperature": 1.0}
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
        self._count("hf", [kept(self.llm, row, sampling().stop) for row in rows])
        return seconds

    def _count(self, side: str, rows: list[list[int]]) -> None:
        self.rows[side] = rows
        self.tokens[side].append(sum(map(len, rows)))

    def mean_logp(self, side: str) -> float:
        """Mean log-probability of a kept token of the last batch."""
        sequences = [[*prompt, *row] for prompt, row in zip(self.prompts, self.rows[side], strict=True)]
        with torch.no_grad():
            logps, _ = self.llm.logps(sequences)
        ours = [
            row[len(p) - 1 : len(p) - 1 + len(x)]
            for row, p, x in zip(logps, self.prompts, self.rows[side], strict=True)
        ]
        return float(torch.cat(ours).mean())


def same_tokens(sides: Sides) -> float:
    """Share of texts that are token for token the same when both take the likeliest token."""
    sides.ours(top_k=1)
    sides.hf(top_k=1)
    pairs = zip(sides.rows["ours"], sides.rows["hf"], strict=True)
    return sum(ours == theirs for ours, theirs in pairs) / len(sides.prompts)


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
    repeats, batch = (1, 16) if options.quick else (3, options.batch)
    whole, trimmed = (
        Sides(demo_llm(vocabulary, options.device), batch, original_llm(demo_config(vocabulary), cache_folder(), print))
        for vocabulary in (False, True)
    )
    same = {"whole": same_tokens(whole), "trimmed": same_tokens(trimmed)}
    for sides in (whole, trimmed):
        sides.tokens = {"ours": [], "hf": []}
    seconds = in_turn({"hf": whole.hf, "ours": whole.ours, "trimmed": trimmed.ours}, repeats)
    tokens = {"hf": whole.tokens["hf"], "ours": whole.tokens["ours"], "trimmed": trimmed.tokens["ours"]}
    rates = {
        side: [count / second for count, second in zip(tokens[side][1:], seconds[side], strict=True)]
        for side in seconds
    }
    limits = {"ours": limit(whole.llm, options.device), "trimmed": limit(trimmed.llm, options.device)}
    figures = {
        "ratio_vs_hf_generate": ratio(rates["ours"], rates["hf"]),
        "ratio_vs_hf_generate_trimmed": ratio(rates["trimmed"], rates["hf"]),
        "fraction_of_limit": round(statistics.median(rates["ours"]) / limits["ours"], 3),
        "fraction_of_limit_trimmed": round(statistics.median(rates["trimmed"]) / limits["trimmed"], 3),
        "tokens_per_second": {side: spread(values) for side, values in rates.items()},
        "tokens_kept": {side: spread([float(count) for count in counts[1:]]) for side, counts in tokens.items()},
        "limit_tokens_per_second": {side: round(value, 1) for side, value in limits.items()},
        "vocabulary": {"whole": len(whole.llm.tokenizer), "trimmed": len(trimmed.llm.tokenizer)},
        "same_greedy_texts": same,
        "mean_logp": {side: round(whole.mean_logp(side), 3) for side in whole.rows},
        "batch": batch,
        "new_tokens": NEW_TOKENS,
        "peak_bytes": peak_memory(),
    }
    finish("generation", figures, options)


if __name__ == "__main__":
    main()
