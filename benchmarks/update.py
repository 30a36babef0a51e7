"""One pass of the LLM's update (Eq. 5 to 9): ``Server.update_llm`` against the plain way.

The plain way has a second model as reference, three forward passes with all logits, ``log_softmax`` over the vocabulary
and autograd; it is what the equations say, line by line. Both train LoRA adapters that start the same on the same texts
and rewards in the same batches. Memory is the largest resident size of a process that does nothing but one side; on a
GPU the most that it had allocated there.

Ours runs with the dtype of the demo's configuration (``auto``: bfloat16 where the processor multiplies in it) and in
float32; the plain way and TRL in float32.

``--trl PYTHON`` also runs TRL's GRPO trainer on the same texts and rewards. It computes a sampled divergence and no
Eq. 7, so it has one forward and backward pass less than ours.

Checked: the parts of the loss of each batch agree with the plain way's to a thousandth; in bfloat16 those of the first
batch to a hundredth, since AdamW's first steps are of the same size however small a gradient is, and so enlarge every
rounding.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from generation import demo_config, demo_llm
from measure import agree, arguments, finish, in_turn, peak_memory, peak_of, ratio, spread
from transformers import AutoModelForCausalLM

from crosslm.llm_update import batches_of_like_length, tokens_stated
from crosslm.models.llm import LLM
from crosslm.models.sources import cache_folder
from crosslm.records import SyntheticSet, SyntheticText
from crosslm.runs.preparation import original_llm
from crosslm.server import Server
from crosslm.synthesis import synthesize
from crosslm.task import Task

SEED = 0


def drafts_and_rewards(llm: LLM, count: int) -> tuple[SyntheticSet, torch.Tensor]:
    """Texts of the original LLM, and rewards from a seed."""
    config = demo_config(False)
    drafts = synthesize(llm, Task.from_config(config.task), config.synthesis, count, SEED)
    return drafts, 2 * torch.rand(count, generator=torch.Generator().manual_seed(SEED)) - 1


def server_for(llm: LLM) -> Server:
    """A server around this LLM; selection is not needed. Without the bound on Eq. 5, which no peer has."""
    demo = demo_config(False)
    config = demo.model_copy(update={"llm": demo.llm.model_copy(update={"generation_floor": 0.0})})
    return Server(config, Task.from_config(config.task), llm, SimpleNamespace())


def reset(llm: LLM, start: dict[str, torch.Tensor]) -> None:
    """The adapter as it was."""
    with torch.no_grad():
        for name, parameter in llm.model.named_parameters():
            if name in start:
                parameter.copy_(start[name])


class Plain:
    """The plain way, with the same optimiser, batches and clipping."""

    def __init__(self, llm: LLM, folder: str) -> None:
        self.server = server_for(llm)
        self.model = llm.model
        self.reference = AutoModelForCausalLM.from_pretrained(folder).to(llm.device).eval().requires_grad_(False)

    def logits(self, model: object, sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All logits that predict a token, the tokens, and which of them are no padding."""
        ids, attention = self.server.llm._pad(sequences)
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
        return logits, ids[:, 1:], attention[:, 1:].bool()

    def update(self, drafts: SyntheticSet, rewards: torch.Tensor) -> list[dict[str, float]]:
        """One pass over the drafts."""
        server, config = self.server, self.server.config.llm
        parameters = server.llm.trainable_parameters()
        statements = tokens_stated(server.llm, server.task, drafts, SEED)
        log = []
        for batch in batches_of_like_length(drafts, config.batch_size, SEED):
            server.optimizer.zero_grad()
            samples = [drafts.samples[row] for row in batch]
            sequences = [[*sample.prompt_ids, *sample.completion_ids] for sample in samples]
            logits, targets, mask = self.logits(self.model, sequences)
            with torch.no_grad():
                reference_logits, _, _ = self.logits(self.reference, sequences)
            log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(reference_logits, -1)
            logps = log_p.gather(2, targets.unsqueeze(2)).squeeze(2)
            reference_logps = log_q.gather(2, targets.unsqueeze(2)).squeeze(2)
            stated_logits, stated, stated_mask = self.logits(self.model, [statements[row] for row in batch])
            stated_logps = torch.log_softmax(stated_logits, -1).gather(2, stated.unsqueeze(2)).squeeze(2)
            prompts = torch.tensor([len(sample.prompt_ids) for sample in samples]).unsqueeze(1)
            is_x = mask & (torch.arange(1, mask.shape[1] + 1).unsqueeze(0) >= prompts).to(mask.device)
            ratio_of = ((logps - reference_logps) * mask).sum(1)
            generation = -(rewards[batch].to(logps) * ratio_of).mean()
            modeling = -(stated_logps * stated_mask).sum(1).mean()
            kl = ((log_p.exp() * (log_p - log_q)).sum(2) * is_x).sum(1).mean()
            loss = (
                config.gamma_generation * generation + config.gamma_language_modeling * modeling + config.gamma_kl * kl
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            server.optimizer.step()
            losses = {"loss": loss, "generation_loss": generation, "kl_loss": kl}
            log.append({name: float(value.detach()) for name, value in losses.items()})
        return log


def folder(vocabulary: bool) -> str:
    """Where the demo's LLM is."""
    return original_llm(demo_config(vocabulary), cache_folder(), print)


def side_memory(count: int, device: str, at_once: int) -> dict[str, int]:
    """Peak of processes that load the whole model and do no more than one side, on texts from a file."""
    drafts, _ = drafts_and_rewards(demo_llm(False, device), count)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "drafts.json"
        path.write_text(json.dumps([dataclasses.asdict(sample) for sample in drafts.samples]))
        sides = {"model alone": "none", "plain": "plain", "ours": "ours", "ours_float32": "float32"}
        fixed = ("--drafts", str(path), "--device", device)
        with ThreadPoolExecutor(at_once) as processes:
            peaks = processes.map(lambda side: peak_of(__file__, "--only", side, *fixed), sides.values())
            return dict(zip(sides, peaks, strict=True))


def only(side: str, path: Path, device: str) -> None:
    """Do one side once, and print the peak: of the process, or on a GPU of what it had allocated there."""
    rows = json.loads(path.read_text())
    samples = [
        SyntheticText(**{**row, **{key: tuple(row[key]) for key in ("prompt_ids", "completion_ids")}}) for row in rows
    ]
    dtype = "auto" if side == "ours" else "float32"
    llm, drafts = demo_llm(False, device, dtype), SyntheticSet(samples)
    rewards = 2 * torch.rand(len(samples), generator=torch.Generator().manual_seed(SEED)) - 1
    if side == "plain":
        Plain(llm, folder(False)).update(drafts, rewards)
    elif side in ("ours", "float32"):
        server_for(llm).update_llm(drafts, rewards, SEED)
    print(peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated())


class Ours:
    """``Server.update_llm`` on one LLM, from the same adapter each time."""

    def __init__(self, llm: LLM, drafts: SyntheticSet, rewards: torch.Tensor) -> None:
        self.llm, self.drafts, self.rewards = llm, drafts, rewards
        self.start = {n: p.detach().clone() for n, p in llm.model.named_parameters() if p.requires_grad}
        self.log: list[dict[str, float]] = []

    def update(self) -> None:
        """One pass over the drafts."""
        reset(self.llm, self.start)
        self.log = server_for(self.llm).update_llm(self.drafts, self.rewards, SEED)


class PlainSide(Ours):
    """The plain way in its place."""

    def __init__(self, llm: LLM, drafts: SyntheticSet, rewards: torch.Tensor, folder: str) -> None:
        super().__init__(llm, drafts, rewards)
        self.plain = Plain(llm, folder)

    def update(self) -> None:
        """One pass over the drafts."""
        reset(self.llm, self.start)
        self.plain.server = server_for(self.llm)
        self.log = self.plain.update(self.drafts, self.rewards)


def difference(mine: list[dict[str, float]], its: list[dict[str, float]]) -> float:
    """The largest difference between parts of the loss, over the larger of 1 and the part itself."""
    pairs = [
        abs(one[key] - other[key]) / max(1.0, abs(other[key]))
        for one, other in zip(mine, its, strict=True)
        for key in other
    ]
    return float(f"{max(pairs):.2g}")


def compare(vocabulary: bool, count: int, repeats: int, device: str) -> dict:
    """Time and results of all sides on one model."""
    exact = demo_llm(vocabulary, device, "float32")
    drafts, rewards = drafts_and_rewards(exact, count)
    sides = {
        "plain": PlainSide(exact, drafts, rewards, folder(vocabulary)),
        "ours_float32": Ours(exact, drafts, rewards),
        "ours": Ours(demo_llm(vocabulary, device), drafts, rewards),
    }
    seconds = in_turn({name: side.update for name, side in sides.items()}, repeats)
    plain = sides["plain"].log
    return {
        "ratio": ratio(seconds["plain"], seconds["ours"]),
        "ratio_float32": ratio(seconds["plain"], seconds["ours_float32"]),
        "samples_per_second": {side: spread([count / second for second in values]) for side, values in seconds.items()},
        "largest_relative_difference": {
            "ours_float32": difference(sides["ours_float32"].log, plain),
            "ours, first batch": difference(sides["ours"].log[:1], plain[:1]),
        },
        "losses": {name: [round(part["loss"], 3) for part in side.log] for name, side in sides.items()},
    }


def trl_seconds(python: str, llm: LLM, drafts: SyntheticSet, rewards: torch.Tensor, repeats: int) -> list[float]:
    """Seconds of each pass of TRL's trainer over the same texts and rewards, by another environment's Python."""
    config = demo_config(False).llm
    batches = [
        {
            "prompts": [drafts.samples[row].prompt_ids for row in rows],
            "completions": [drafts.samples[row].completion_ids for row in rows],
            "rewards": rewards[rows].tolist(),
        }
        for rows in batches_of_like_length(drafts, config.batch_size, SEED)
    ]
    work = {
        "model": folder(False),
        "batches": batches,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "rank": config.lora_rank,
        "alpha": config.lora_alpha,
        **{name: getattr(config, name) for name in ("gamma_kl", "learning_rate", "max_grad_norm")},
    }
    script = Path(__file__).with_name("update_trl.py")
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "work.json").write_text(json.dumps(work))
        command = [python, str(script), str(Path(place) / "work.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def against_trl(python: str, count: int, repeats: int) -> dict:
    """Ours before and after TRL's, so that a machine that changes its speed meets both."""
    exact = demo_llm(False, "cpu", "float32")
    drafts, rewards = drafts_and_rewards(exact, count)
    sides = {
        name: Ours(llm, drafts, rewards).update
        for name, llm in (("ours", demo_llm(False, "cpu")), ("ours_float32", exact))
    }
    before = in_turn(sides, repeats)
    theirs = trl_seconds(python, exact, drafts, rewards, repeats)
    after = in_turn(sides, repeats)
    seconds = {name: [*before[name], *after[name]] for name in sides} | {"trl": theirs}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "ratio_vs_trl": round(middle["trl"] / middle["ours"], 2),
        "ratio_vs_trl_float32": round(middle["trl"] / middle["ours_float32"], 2),
        "trl": {
            "samples_per_second": {name: spread([count / one for one in values]) for name, values in seconds.items()}
        },
    }


def main() -> None:
    """Measure the whole and the trimmed vocabulary."""
    if "--only" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--only")
        parser.add_argument("--drafts", type=Path, required=True)
        parser.add_argument("--device", default="cpu")
        options = parser.parse_args()
        only(options.only, options.drafts, options.device)
        return
    options = arguments(__doc__, trl={"metavar": "PYTHON", "help": "interpreter of an environment with trl and peft"})
    count, repeats = (8, 1) if options.quick else (32, 2)
    whole = compare(False, count, repeats, options.device)
    trimmed = compare(True, count, repeats, options.device)
    peaks = side_memory(count, options.device, 2 if options.quick else 1)
    figures = {
        "ratio_vs_plain": whole["ratio"],
        "ratio_vs_plain_trimmed": trimmed["ratio"],
        "ratio_vs_plain_float32": whole["ratio_float32"],
        "texts": count,
        "whole": whole,
        "trimmed": trimmed,
        "memory_ratio_vs_plain": round(peaks["ours"] / peaks["plain"], 3),
        "memory_ratio_vs_plain_float32": round(peaks["ours_float32"] / peaks["plain"], 3),
        "peak_bytes": peaks,
    }
    if options.trl and options.device == "cpu":
        figures |= against_trl(options.trl, count, repeats)
    agree(
        {
            f"losses, {vocabulary} vocabulary, {side}": (found, 1e-3 if side == "ours_float32" else 1e-2)
            for vocabulary, part in (("whole", whole), ("trimmed", trimmed))
            for side, found in part["largest_relative_difference"].items()
        }
    )
    finish("update", figures, options)


if __name__ == "__main__":
    main()
