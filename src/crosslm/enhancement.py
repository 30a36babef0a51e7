"""Step 5 (CrossLM, section 4): choose the best texts of a pool and train an SLM on them.

The same for CrossLM and for Data-free KD, whose pool the original LLM wrote.
"""

import torch
from torch import Tensor

from crosslm.algorithm.selection import (
    EXACT_TEXTS,
    agreed_rewards,
    approximate_diversity,
    diversity,
    quality_diversity_scores,
    select_top,
)
from crosslm.algorithm.soft_labels import intended_label_accuracy, with_intended_labels
from crosslm.config import Config, SelectionConfig, SLMConfig
from crosslm.models.encoder import Encoder
from crosslm.models.slm import SLM
from crosslm.progress import Progress
from crosslm.records import Receipt, SyntheticSet, Upload
from crosslm.seeding import seed_for


def select(
    pool: SyntheticSet, rewards: Tensor, encoder: Encoder, config: SelectionConfig, posteriors: Tensor | None = None
) -> tuple[list[Receipt], list[int]]:
    """Quality times diversity, and the best alpha % of the pool (Eq. 10).

    Args:
        pool: texts to choose from.
        rewards: ``(texts,)``, Eq. 4.
        encoder: for the diversity.
        config: how.
        posteriors: ``(texts,)``, the LLM's probability of the intended labels; the rewards are weighed by them.

    Returns:
        A receipt for each text, and the places of those kept, best first.
    """
    vectors = encoder.encode(pool.texts)
    diversities = diversity(vectors) if len(vectors) <= EXACT_TEXTS else approximate_diversity(vectors)
    quality = rewards if posteriors is None else agreed_rewards(rewards, posteriors)
    scores = quality_diversity_scores(quality, diversities)
    if config.score != "product":
        scores = quality if config.score == "reward" else diversities
    labels = pool.labels if config.class_balance else None
    kept: list[int] = select_top(scores, config.fraction, rewards, config.nonpositive_rewards, labels).tolist()
    ranks = torch.argsort(torch.argsort(scores, descending=True, stable=True)) + 1
    chosen = set(kept)
    columns = zip(rewards.tolist(), diversities.tolist(), scores.tolist(), ranks.tolist(), strict=True)
    return [Receipt(*values, kept=place in chosen) for place, values in enumerate(columns)], kept


def train_on_synthetic(
    slm: SLM,
    pool: SyntheticSet,
    kept: list[int],
    judged: Tensor,
    upload: Upload,
    config: Config,
    progress: Progress,
    detail: str,
) -> dict[str, float]:
    """Train an SLM on the selected texts of a pool.

    Args:
        slm: to train.
        pool: of texts.
        kept: places of the selected ones.
        judged: ``(texts, labels)`` of the whole pool, the probabilities that its rewards were made of.
        upload: what the SLM came in.
        config: of the run.
        progress: is told of the training.
        detail: who it is, for the display.

    Returns:
        What :meth:`SLM.fit` returns; nothing if there is no text.
    """
    texts, targets = pool.examples(kept), soft_labels(pool, judged, config.slm)
    with progress.stage(
        "train SLM on synthetic text", detail, len(texts) * config.slm.synthetic.epochs, "rows"
    ) as advance:
        if not len(texts):
            return {}
        seed = seed_for(config.seed, "synthetic", upload.client_id, upload.client_round)
        metrics = slm.fit(texts, config.slm.synthetic, seed, advance, None if targets is None else targets[kept])
        if config.slm.interpolation < 1:
            slm.interpolate(upload.slm.weights, config.slm.interpolation)
        return metrics


def soft_labels(pool: SyntheticSet, judged: Tensor, config: SLMConfig) -> Tensor | None:
    """Probabilities that a text's training aims at, ``(texts, labels)``; none where its intended label is learned.

    Args:
        pool: of texts, all of which say how often the LLM wrote what it was told to.
        judged: ``(texts, labels)``, the SLMs' judgement.
        config: what is learned.
    """
    if not config.soft_labels:
        return None
    if not config.intended_labels:
        return judged
    return with_intended_labels(judged, pool.labels, intended_label_accuracy(judged, pool.labels))
