"""Step 4: what the LLM writes and the rewards for it train the LLM (CrossLM, section 4.2, Eq. 5 to 9)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from crosslm.algorithm.losses import generation_loss, kl_loss, language_modeling_loss, objective, sequence_logps
from crosslm.config import LLMConfig, SynthesisConfig
from crosslm.errors import CollapseError, ModelError
from crosslm.models.llm import LLM
from crosslm.records import SyntheticSet
from crosslm.support.seeding import seed_for
from crosslm.task import Task

ANCHOR_TOKENS, ANCHORS_A_STEP = 48, 8
AT_FIRST, AT_FIRST_ON_A_GPU = 1e-2, 2.0
"""Nats of a text between the LLM and its original before the first update, at most. The same kernels on the same
numbers give 0, in bfloat16 as well; a GPU may take others where no gradient is kept, whose rounding is not known."""


def one_pass(
    llm: LLM,
    task: Task,
    optimizer: torch.optim.Optimizer,
    drafts: SyntheticSet,
    rewards: Tensor,
    config: LLMConfig,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
    anchors: Sequence[Sequence[int]] = (),
) -> list[dict[str, float]]:
    """One pass over the drafts, minimising Eq. 9.

    Args:
        llm: whose trainable parameters the optimiser has.
        task: for M'(y).
        optimizer: goes on from its state.
        drafts: texts of this LLM.
        rewards: ``(texts,)``, Eq. 4, or advantages in its place.
        config: weights of the losses, sizes of batches, and bounds.
        seed: of the order of the batches and of the paraphrases of M'(y).
        advance: told of each micro-batch's number of texts.
        anchors: from :func:`anchor_texts`, where ``llm.gamma_anchor`` is above 0.

    Returns:
        The parts of the loss and the mean log-ratio for each optimiser step, before it.

    Raises:
        CollapseError: a loss is not finite.
        ModelError: the parameters did not change.
    """
    before = llm.fingerprint()
    parameters = llm.trainable_parameters()
    statements = tokens_stated(llm, task, drafts, seed)
    batches = batches_of_like_length(drafts, config.batch_size, seed)
    anchors = _shuffled(anchors, seed)
    log: list[dict[str, float]] = []
    for batch in batches:
        optimizer.zero_grad()
        parts: dict[str, float] = {}
        for start in range(0, len(batch), config.micro_batch_size):
            rows = batch[start : start + config.micro_batch_size]
            share = backward(llm, config, drafts, rewards, statements, rows, len(batch))
            parts = {name: parts.get(name, 0.0) + value for name, value in share.items()}
            advance(len(rows))
        if anchors:
            first = len(log) * ANCHORS_A_STEP
            parts["anchor_loss"] = hold_to(
                llm, config, [anchors[(first + place) % len(anchors)] for place in range(ANCHORS_A_STEP)]
            )
        if not optimizer.state:  # nothing has been updated yet
            check_first_update(parts, llm)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        parts["gradient_norm"] = float(norm)
        if not all(torch.isfinite(torch.tensor(value)) for value in parts.values()):
            raise CollapseError(f"the LLM's update is not finite: {parts}; lower llm.learning_rate")
        optimizer.step()
        log.append(parts)
    if llm.fingerprint() == before:
        raise ModelError(
            "the LLM's update changed nothing: are llm.gamma_generation and the others 0, or all rewards alike?"
        )
    return log


def backward(
    llm: LLM,
    config: LLMConfig,
    drafts: SyntheticSet,
    rewards: Tensor,
    statements: list[list[int]],
    rows: list[int],
    batch_size: int,
) -> dict[str, float]:
    """Add the gradients of these rows' share of the batch's mean loss; gives its parts.

    Eq. 9 is a sum: what it says of ``[M(y), x]`` goes backward before ``[x, M'(y)]`` is read, so that the activations
    of one of them are held at a time.
    """
    gammas = config.gamma_generation, config.gamma_language_modeling, config.gamma_kl
    samples = [drafts.samples[row] for row in rows]
    scores = llm.score([[*sample.prompt_ids, *sample.completion_ids] for sample in samples])  # [M(y), x]
    is_x = scores.mask & _after([len(sample.prompt_ids) for sample in samples], scores.mask)
    logps = sequence_logps(scores.logps, scores.mask, config.token_reduction)  # Eq. 6
    reference_logps = sequence_logps(scores.reference_logps, scores.mask, config.token_reduction)
    weights, floor = rewards[rows].to(logps), config.generation_floor
    generation = generation_loss(logps, reference_logps, weights, floor)  # Eq. 5
    kl = kl_loss(scores.kl, is_x, config.token_reduction)  # Eq. 8
    nothing = torch.zeros_like(generation)
    (objective(generation, nothing, kl, *gammas).sum() / batch_size).backward()

    stated_logps, stated_mask = llm.logps([statements[row] for row in rows])  # [x, M'(y)]
    modeling = language_modeling_loss(sequence_logps(stated_logps, stated_mask, config.token_reduction))  # Eq. 7
    (objective(nothing, modeling, nothing, *gammas).sum() / batch_size).backward()
    parts = {
        "loss": objective(generation, modeling, kl, *gammas),  # Eq. 9
        "generation_loss": generation,
        "language_modeling_loss": modeling,
        "kl_loss": kl,
        "log_ratio": logps - reference_logps,
        "advantage": rewards[rows],
        "tokens": scores.mask.sum(dim=1).float(),
    }
    return {name: float(values.detach().sum()) / batch_size for name, values in parts.items()}


def anchor_texts(llm: LLM, count: int, seed: int, at_once: int = 64) -> list[list[int]]:
    """What the original LLM writes without a prompt, as tokens: its own language, whatever the task (ours).

    A model without a beginning-of-sequence token begins after its end-of-sequence token, as GPT-2 does.

    Args:
        llm: whatever it has learned since.
        count: texts wanted.
        seed: everything random follows from it.
        at_once: texts in a batch.

    Raises:
        ModelError: it has neither of these tokens.
    """
    begin = tuple(llm.encode("")) or tuple(sorted(end for end in llm.end_ids if end is not None)[:1])
    if not begin:
        raise ModelError("llm.gamma_anchor: the LLM's tokenizer has no token to begin a text with; set it to 0")
    seeds = [seed_for(seed, "anchor", place) for place in range(count)]
    sampling, written = SynthesisConfig(max_new_tokens=ANCHOR_TOKENS, stop=()), list[list[int]]()
    for start in range(0, count, at_once):
        some = seeds[start : start + at_once]
        written += llm.generate([begin] * len(some), some, sampling, original=True)
    return [[*begin, *text] for text in written]


def hold_to(llm: LLM, config: LLMConfig, anchors: Sequence[Sequence[int]]) -> float:
    """Add the gradients of ``gamma_a`` times the mean divergence (as in Eq. 8) over these anchors; gives that mean."""
    total = 0.0
    for start in range(0, len(anchors), config.micro_batch_size):
        scores = llm.score(anchors[start : start + config.micro_batch_size])
        share = kl_loss(scores.kl, scores.mask, config.token_reduction).sum() / len(anchors)
        (config.gamma_anchor * share).backward()
        total += float(share.detach())
    return total


def _shuffled(anchors: Sequence[Sequence[int]], seed: int) -> list[Sequence[int]]:
    """In another order in each update, so that all of them have their turn."""
    order = torch.randperm(len(anchors), generator=torch.Generator().manual_seed(seed))
    return [anchors[place] for place in order.tolist()]


def tokens_stated(llm: LLM, task: Task, drafts: SyntheticSet, seed: int) -> list[list[int]]:
    """Tokens of ``[x, M'(y)]`` for each draft, the paraphrase of M' drawn uniformly."""
    statements = []
    for place, sample in enumerate(drafts.samples):
        paraphrase = seed_for(seed, "statement", place) % len(task.statements[sample.label])
        statements.append(llm.encode(task.stated(sample.text, sample.label, paraphrase)))
    return statements


def check_first_update(parts: dict[str, float], llm: LLM) -> None:
    """Guards against training that silently does nothing, or something else.

    Before the first update the LLM is the original: log-ratio and divergence are 0. And gradients
    have reached all that is trained and nothing that is frozen.

    Raises:
        ModelError: it is not so.
    """
    is_rounded = llm.device.type != "cpu" and llm.model.dtype != torch.float32
    allowed = AT_FIRST_ON_A_GPU if is_rounded else AT_FIRST
    if max(abs(parts["log_ratio"]), abs(parts["kl_loss"])) > allowed:
        raise ModelError(
            f"before the first update the LLM differs from its original: log-ratio {parts['log_ratio']:.4f}, "
            f"KL {parts['kl_loss']:.4f}; both must be 0. Is an adapter loaded twice, or dropout on?"
        )
    reached = {name for name, parameter in llm.model.named_parameters() if parameter.grad is not None}
    trained = {name for name, parameter in llm.model.named_parameters() if parameter.requires_grad}
    if reached != trained:
        raise ModelError(f"gradients reached {len(reached)} parameters, but {len(trained)} are trained")


def _after(lengths: list[int], mask: Tensor) -> Tensor:
    """True at the tokens of x: column j of a score belongs to token j + 1 of the sequence."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return columns.unsqueeze(0) >= torch.tensor(lengths, device=mask.device).unsqueeze(1)


def batches_of_like_length(drafts: SyntheticSet, size: int, seed: int) -> list[list[int]]:
    """Every draft once, in batches of like length (less padding) that come in random order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(sample.prompt_ids) + len(sample.completion_ids) for sample in drafts.samples]
    shuffled: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    ordered = sorted(shuffled, key=lambda row: lengths[row])
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
