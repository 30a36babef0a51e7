"""Step 4: the LLM's objective (CrossLM, section 4.2, Eq. 5 to 9).

Log-probabilities in, one number per sequence out. No model is touched here.
"""

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sum", "mean"]


def sequence_logps(token_logps: Tensor, mask: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Log-likelihood of each sequence, Eq. 6: ``log p(s) = sum_i log P(s_i | s_<i)``.

    Args:
        token_logps: ``(batch, tokens)``, natural logarithms.
        mask: ``(batch, tokens)``, true where the token counts.
        reduction: ``"sum"`` is the paper's product of probabilities; ``"mean"`` divides by the
            number of tokens that count (ours).

    Returns:
        ``(batch,)``. A sequence without tokens gives 0.
    """
    total = (token_logps * mask).sum(dim=1)
    return total if reduction == "sum" else total / mask.sum(dim=1).clamp_min(1)


def generation_loss(logps: Tensor, reference_logps: Tensor, rewards: Tensor, floor: float = 0.0) -> Tensor:
    """Quality-driven generation loss, Eq. 5: ``-r (log p_theta - log p_theta_old)``.

    Args:
        logps: ``(batch,)``, of ``[M(y), x]`` under the LLM (Eq. 6).
        reference_logps: ``(batch,)``, of the same under the original LLM; a constant, so it
            shifts the value of the loss and not its gradient.
        rewards: ``(batch,)``, Eq. 4; a constant as well.
        floor: nats (ours). A text with a negative reward whose log-ratio has fallen to ``-floor`` is
            pushed down no further: the loss stays at ``r floor`` and has no gradient. 0: as written,
            without a lower bound for a negative reward; what pulls back then is Eq. 8.

    Returns:
        ``(batch,)``.
    """
    rewards, log_ratios = rewards.detach(), logps - reference_logps.detach()
    if floor:
        log_ratios = torch.where(rewards < 0, log_ratios.clamp_min(-floor), log_ratios)
    return -rewards * log_ratios


def language_modeling_loss(logps: Tensor) -> Tensor:
    """Standard unsupervised training loss, Eq. 7: ``-log p_theta([x, M'(y)])``.

    Args:
        logps: ``(batch,)``, of ``[x, M'(y)]`` under the LLM (Eq. 6).
    """
    return -logps


def token_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Exact KL divergence of the next-token distributions, the summand of Eq. 8.

    ``D_KL(pi_theta || pi_theta_old) = sum_v pi_theta(v) (log pi_theta(v) - log pi_theta_old(v))``
    over the whole vocabulary. By the chain rule the divergence of the distributions over x is the
    expected sum of these along x; it is taken along the sampled x.

    Args:
        logits: ``(tokens, vocabulary)``, of the LLM.
        reference_logits: ``(tokens, vocabulary)``, of the original LLM.

    Returns:
        ``(tokens,)``, at least 0, in nats.
    """
    logps = torch.log_softmax(logits.float(), dim=-1)
    reference_logps = torch.log_softmax(reference_logits.float(), dim=-1)
    return (logps.exp() * (logps - reference_logps)).sum(dim=-1)


def kl_loss(token_kls: Tensor, mask: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Probability regularisation loss, Eq. 8: KL from the original LLM over x given M(y).

    Args:
        token_kls: ``(batch, tokens)``, from :func:`token_kl`.
        mask: ``(batch, tokens)``, true at the tokens of x, false at those of M(y).
        reduction: as in :func:`sequence_logps`; the same for all three losses, since the gammas
            only make sense then.

    Returns:
        ``(batch,)``.
    """
    return sequence_logps(token_kls, mask, reduction)


def objective(
    generation: Tensor,
    language_modeling: Tensor,
    kl: Tensor,
    gamma_generation: float,
    gamma_language_modeling: float,
    gamma_kl: float,
) -> Tensor:
    """The LLM's objective, Eq. 9: ``g1 L_g + g2 L_t + g3 L_r``.

    Args:
        generation: ``(batch,)``, Eq. 5.
        language_modeling: ``(batch,)``, Eq. 7.
        kl: ``(batch,)``, Eq. 8.
        gamma_generation: the paper's gamma_1.
        gamma_language_modeling: the paper's gamma_2.
        gamma_kl: the paper's gamma_3.

    Returns:
        ``(batch,)``; the caller takes the mean over the batch.
    """
    return gamma_generation * generation + gamma_language_modeling * language_modeling + gamma_kl * kl
