"""Step 4: the SLM's feedback on a synthetic text (CrossLM, section 4.2, Eq. 4)."""

import torch
from torch import Tensor


def label_rewards(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Reward of each text, Eq. 4: ``r(x, y) = 2 S(y|x) - 1``.

    Args:
        probabilities: ``(batch, classes)``, the SLM's class probabilities ``S(.|x)``.
        labels: ``(batch,)``, the intended class of each text, as an index.

    Returns:
        ``(batch,)``, in [-1, 1]: 1 when the SLM is sure of the intended label, -1 when it is
        sure of another.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)} must be (batch, classes) and "
            f"labels {tuple(labels.shape)} must be (batch,)"
        )
    return 2 * probabilities.gather(1, labels.unsqueeze(1)).squeeze(1) - 1


def leave_one_out_advantages(rewards: Tensor, labels: Tensor) -> Tensor:
    """What takes the place of r in Eq. 5 with ``reward.baseline = "leave_one_out"`` (ours).

    ``a_j = r_j - mean of r_k over the other texts k of the same label``: the baseline of Ahmadian et
    al. 2024 (RLOO). It does not depend on x_j, so for texts of the LLM as it is it changes no
    expected gradient of ``log P(x_j|M(y_j))``, only its variance.

    Args:
        rewards: ``(texts,)``, Eq. 4.
        labels: ``(texts,)``, the intended labels.

    Returns:
        ``(texts,)``; 0 for a text that is the only one of its label.
    """
    counts = labels.bincount()
    sums = torch.zeros(len(counts)).to(rewards).index_add(0, labels, rewards)
    others = counts[labels] - 1
    mean = (sums[labels] - rewards) / others.clamp_min(1)
    return torch.where(others > 0, rewards - mean, torch.zeros_like(rewards))


def correct_prior(probabilities: Tensor, class_counts: Tensor) -> Tensor:
    """Class probabilities as if the classifier had been trained on balanced classes.

    Ours, not the paper's (``reward.correct_prior``). By Bayes' rule a classifier trained with
    class shares ``pi`` gives ``S(y|x) ~ P(x|y) pi(y)``; dividing by ``pi`` and normalising gives
    the posterior under uniform classes, which is what Eq. 2 draws labels from. Shares are
    smoothed by one count a class, so that an unseen class does not divide by zero. Source: Saerens,
    Latinne and Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori
    Probabilities", Neural Computation 2002, Eq. 2.4.

    Args:
        probabilities: ``(batch, classes)``.
        class_counts: ``(classes,)``, training examples of each class, in the same order.

    Returns:
        ``(batch, classes)``, rows sum to 1.
    """
    shares = (class_counts + 1) / (class_counts + 1).sum()
    weighted = probabilities / shares
    return weighted / weighted.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weighted.dtype).tiny)
