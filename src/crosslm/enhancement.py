"""Step 5 (CrossLM, section 4): choose the best texts of a pool and train an SLM on them.

The same for CrossLM and for Data-free KD, whose pool the original LLM wrote.
"""

import torch
from torch import Tensor

from crosslm.algorithm.rewards import label_rewards
from crosslm.algorithm.selection import (
    EXACT_TEXTS,
    agreed_rewards,
    approximate_diversity,
    diversity,
    quality_diversity_scores,
    select_top,
)
from crosslm.algorithm.soft_labels import (
    intended_label_accuracy,
    opinion_pool,
    weight_beside,
    with_intended_labels,
    without_preference,
)
from crosslm.config import Config, SelectionConfig, SLMConfig
from crosslm.errors import UploadError
from crosslm.models.encoder import Encoder
from crosslm.models.slm import SLM
from crosslm.records import Receipt, SyntheticSet, Upload
from crosslm.support.progress import Progress
from crosslm.support.seeding import seed_for

PROBED = 768
"""Texts that judges are weighed by, at most: with a third of it weights depend on which where few fit their label."""


def pool_rewards(pool: SyntheticSet, judged: Tensor | None, said: Tensor | None) -> Tensor:
    """Reward of each text of a pool, Eq. 4; where no SLM may judge, the LLM's own probability takes its place.

    Args:
        pool: of texts.
        judged: ``(texts, labels)``, the SLMs' judgement; None where there is none.
        said: ``(texts, labels)``, the LLM's (Eq. 1); needed there.
    """
    if judged is None and said is not None:
        judged = without_preference(said)
    if judged is None:
        raise ValueError("neither an SLM nor the LLM has judged the pool")
    return label_rewards(judged, pool.labels)


def select(
    pool: SyntheticSet, rewards: Tensor, encoder: Encoder, config: SelectionConfig, said: Tensor | None = None
) -> tuple[list[Receipt], list[int]]:
    """Quality times diversity, and the best alpha % of the pool (Eq. 10).

    Args:
        pool: texts to choose from.
        rewards: ``(texts,)``, Eq. 4.
        encoder: for the diversity.
        config: how.
        said: ``(texts, labels)``, the LLM's own probabilities (Eq. 1), for ``selection.llm_posterior``.

    Returns:
        A receipt for each text, and the places of those kept, best first.
    """
    vectors = encoder.encode(pool.texts)
    measure = diversity if len(vectors) <= EXACT_TEXTS else approximate_diversity
    diversities = measure(vectors).cpu()  # of each text one number; the vectors stay where they were made
    quality = rewards
    if config.llm_posterior and said is not None:
        quality = agreed_rewards(rewards, said.gather(1, pool.labels.unsqueeze(1)).squeeze(1))
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
    targets: Tensor | None,
    upload: Upload,
    config: Config,
    progress: Progress,
    detail: str,
) -> dict[str, float]:
    """Train an SLM on the selected texts of a pool.

    With ``gate.new_head`` one whose rows all have one label begins with a new output layer, and learns as in step 1;
    not under DP, whose step 1 trains other layers at other rates.

    Args:
        slm: to train.
        pool: of texts.
        kept: places of the selected ones.
        targets: of the whole pool, from :func:`soft_labels`.
        upload: what the SLM came in.
        config: of the run.
        progress: is told of the training.
        detail: who it is, for the display.

    Returns:
        What :meth:`SLM.fit` returns; nothing if there is no text.

    Raises:
        UploadError: it cannot be trained, for whatever reason.
    """
    texts, fit = pool.examples(kept), config.slm.synthetic
    seed = seed_for(config.seed, "synthetic", upload.client_id, upload.client_round)
    begins_anew = config.gate.new_head and config.gate.teaches and upload.only_label and not config.privacy.epsilon
    if begins_anew:
        fit = config.slm.private.model_copy(update={"patience": 0})
    with progress.stage("train SLM on synthetic text", detail, len(texts) * fit.epochs, "rows") as advance:
        if not len(texts):
            return {}
        try:
            if begins_anew:
                slm.new_head(seed)
            metrics = slm.fit(texts, fit, seed, advance, None if targets is None else targets[kept])
        except Exception as error:  # it came from elsewhere: it may be too large here, or made so that it fails
            why = f"{type(error).__name__}: {str(error)[:120]}"
            raise UploadError(f"client {upload.client_id}: its SLM cannot be trained: {why}; look at it") from error
        if not slm.is_finite():
            raise UploadError(
                f"client {upload.client_id}: step 5 left weights of its SLM that are not finite; "
                f"lower slm.{'private' if begins_anew else 'synthetic'}.learning_rate, or look at that client"
            )
        if config.slm.interpolation < 1 and not begins_anew:
            slm.interpolate(upload.slm.weights, config.slm.interpolation)
        return metrics


def soft_labels(
    pool: SyntheticSet,
    judged: Tensor | None,
    said: Tensor | None,
    config: SLMConfig,
    weight: float = 1.0,
) -> Tensor | None:
    """Probabilities that a text's training aims at, ``(texts, labels)``; none where its intended label is learned.

    Args:
        pool: of texts, all of which say how often the LLM wrote what it was told to.
        judged: ``(texts, labels)``, the SLMs' judgement; None where there is none.
        said: ``(texts, labels)``, the LLM's (Eq. 1), for ``slm.llm_judges``.
        config: what is learned.
        weight: of the SLMs' judgement beside the LLM's, from :func:`weigh_judges`.
    """
    opinions = judged
    if config.llm_judges and said is not None:
        own = without_preference(said)
        opinions = own if judged is None else opinion_pool(judged, own, weight)
    if not config.soft_labels or opinions is None:
        return None
    if not config.intended_labels:
        return opinions
    return with_intended_labels(opinions, pool.labels, intended_label_accuracy(opinions, pool.labels))


def probe_of(base: SyntheticSet, config: Config) -> SyntheticSet:
    """The texts of the original LLM that judges are weighed by; none where all count alike (``slm.weigh_judges``)."""
    return SyntheticSet(base.samples[:PROBED] if config.weighs_judges else [])


def weigh_judges(probe: SyntheticSet, judged: Tensor | None, said: Tensor | None) -> float:
    """How much the SLMs' judgement counts beside the LLM's in soft labels; 1 where there is no probe.

    Args:
        probe: from :func:`probe_of`: no SLM has influenced it.
        judged: ``(texts, labels)``, the SLMs' judgement, of the probe first; None where there is none.
        said: ``(texts, labels)``, the LLM's (Eq. 1), of the same.
    """
    count = len(probe.samples)
    if not count or judged is None or said is None:
        return 1.0
    return weight_beside(judged[:count], without_preference(said[:count]), probe.labels)
