"""Other families than Gemma: generation and the update of a GPT-2 and of a Llama model, against the same peers.

Their time does not depend on what the weights are, so these are random: the smallest GPT-2 (12 layers of 768, 50,257
tokens) and a Llama of its width (12 layers, 32,000 tokens), with a tokenizer of made-up words. Prompts and texts are
random tokens. Everything else is as in ``generation.py`` and ``update.py``, in float32 on both sides, and so are the
checks: the same tokens where both take the likeliest, and the same losses.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from generation import NEW_TOKENS, Generate, Side, demo_config, same_tokens
from measure import agree, arguments, finish, in_turn, peak_memory, ratio, spread
from random_bert import word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from update import Ours, PlainSide, difference

from crosslm.models.llm import LLM
from crosslm.records import SyntheticSet, SyntheticText

PROMPT_TOKENS, SEED = 12, 0


def gpt2(quick: bool) -> PreTrainedModel:
    """The smallest GPT-2; two layers of it to see that it runs."""
    return GPT2LMHeadModel(GPT2Config(n_layer=2 if quick else 12, bos_token_id=0, eos_token_id=0))


def llama(quick: bool) -> PreTrainedModel:
    """A Llama of GPT-2's width."""
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
    config = LlamaConfig(num_hidden_layers=2 if quick else 12, bos_token_id=0, eos_token_id=0, **shape)
    return LlamaForCausalLM(config)


FAMILIES = {"gpt2": gpt2, "llama": llama}


def random_rows(llm: LLM, rows: int, tokens: int, seed: int) -> list[tuple[int, ...]]:
    """Rows of random tokens, none of which ends a text."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(10, llm.model.config.vocab_size, (rows, tokens), generator=generator)
    return [tuple(row) for row in drawn.tolist()]


def random_drafts(llm: LLM, count: int) -> SyntheticSet:
    """Texts that nobody wrote, of both labels."""
    prompts, texts = random_rows(llm, 2, PROMPT_TOKENS, SEED), random_rows(llm, count, NEW_TOKENS, SEED + 1)
    written = enumerate(zip(texts, map(llm.tokenizer.decode, texts), strict=True))
    return SyntheticSet(
        [SyntheticText(text, place % 2, "", prompts[place % 2], ids, place) for place, (ids, text) in written]
    )


def generation(llm: LLM, folder: str, batch: int, repeats: int) -> dict[str, Any]:
    """Ours beside ``model.generate``."""
    prompts = random_rows(llm, 4, PROMPT_TOKENS, SEED) * (batch // 4)
    ours, peer = Side(llm, prompts), Generate(llm, prompts, folder, torch.float32)
    same = same_tokens(ours, peer)
    ours.tokens, peer.tokens = [], []
    seconds = in_turn({"ours": ours.write, "hf": peer.write}, repeats)
    counts = {"ours": ours.tokens[1:], "hf": peer.tokens[1:]}
    rates = {name: [count / one for count, one in zip(counts[name], seconds[name], strict=True)] for name in seconds}
    return {
        "ratio_vs_hf_generate": ratio(rates["ours"], rates["hf"]),
        "same_greedy_texts": same,
        "tokens_per_second": {name: spread(values) for name, values in rates.items()},
    }


def update(llm: LLM, folder: str, count: int, repeats: int) -> dict[str, Any]:
    """Ours beside the plain way."""
    drafts = random_drafts(llm, count)
    rewards = 2 * torch.rand(count, generator=torch.Generator().manual_seed(SEED)) - 1
    sides = {"plain": PlainSide(llm, drafts, rewards, folder), "ours": Ours(llm, drafts, rewards)}
    seconds = in_turn({name: side.update for name, side in sides.items()}, repeats)
    return {
        "ratio_vs_plain": ratio(seconds["plain"], seconds["ours"]),
        "largest_relative_difference": difference(sides["ours"].log, sides["plain"].log),
        "samples_per_second": {name: spread([count / one for one in values]) for name, values in seconds.items()},
    }


def main() -> None:
    """Measure each family."""
    options = arguments(__doc__)
    repeats, batch, count = (1, 8, 8) if options.quick else (3, 64, 32)
    figures: dict[str, Any] = {}
    unlike: dict[str, tuple[float, float]] = {}
    config = demo_config(False).llm.model_copy(update={"dtype": "float32"})
    for family, make in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(SEED)
            model = make(options.quick)
            model.save_pretrained(folder)
            word_tokenizer(Path(folder), model.config.vocab_size, eos_token="[PAD]", bos_token="[PAD]")
            llm = LLM.load(folder, config, seed=SEED, device=options.device)
            figures[family] = {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "generation": generation(llm, folder, batch, repeats),
                "update": update(llm, folder, count, repeats),
            }
        unlike[f"{family}: texts that differ with top-k 1"] = (
            1 - figures[family]["generation"]["same_greedy_texts"],
            0.05,
        )
        unlike[f"{family}: losses"] = (figures[family]["update"]["largest_relative_difference"], 1e-3)
    agree(unlike)
    finish("families", figures | {"batch": batch, "texts": count, "peak_bytes": peak_memory()}, options)


if __name__ == "__main__":
    main()
