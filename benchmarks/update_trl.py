"""The other side of ``update.py --trl PYTHON``: TRL's GRPO trainer on the same texts and rewards.

Runs in an environment of its own (``pip install trl peft``), without crosslm. It reads a JSON file of batches of tokens
and rewards and prints a JSON object of seconds a pass. Generation and rewards are left out of the time; the reference's
log-probabilities, the loss with its divergence term, the backward pass and the optimiser's step are in it.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def padded(rows: list[list[int]], left: bool, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask


def main() -> None:
    """Time as many passes as the file asks for, after one that is not timed."""
    work = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(work["threads"])
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    size = len(work["batches"][0]["rewards"])
    with tempfile.TemporaryDirectory() as output:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                output_dir=output,
                per_device_train_batch_size=size,
                num_generations=size,
                beta=work["gamma_kl"],
                learning_rate=work["learning_rate"],
                max_grad_norm=work["max_grad_norm"],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
            ),
            train_dataset=Dataset.from_list([{"prompt": "x"}] * size),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=work["rank"], lora_alpha=work["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.create_optimizer()
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        seconds = []
        for _ in range(work["repeats"] + 1):
            started = time.perf_counter()
            for batch in work["batches"]:
                step(trainer, batch, tokenizer.pad_token_id, work["max_grad_norm"])
            seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds[1:]}))


def step(trainer: GRPOTrainer, batch: dict, pad: int, max_grad_norm: float) -> None:
    """One optimiser step."""
    prompt_ids, prompt_mask = padded(batch["prompts"], True, pad)
    completion_ids, completion_mask = padded(batch["completions"], False, pad)
    ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
    with torch.no_grad(), trainer.model.disable_adapter():
        reference, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, completion_ids.shape[1])
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(batch["rewards"]),
        "ref_per_token_logps": reference,
        "num_items_in_batch": completion_mask.sum(),
    }
    trainer.optimizer.zero_grad()
    trainer.compute_loss(trainer.model, inputs).backward()
    torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], max_grad_norm)
    trainer.optimizer.step()


if __name__ == "__main__":
    main()
