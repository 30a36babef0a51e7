"""The LLM as a classifier (CrossLM, section 3, Eq. 1)."""

from torch import Tensor


def label_probabilities(verbalizer_logps: Tensor) -> Tensor:
    """Class probabilities, Eq. 1: ``p(y|x) = P(V(y)|M(x))``, normalised so that the labels' sum is 1.

    Args:
        verbalizer_logps: ``(texts, labels)``, ``log P(V(y)|M(x))`` of each label's verbalizer, natural
            logarithms, up to a constant of the text.

    Returns:
        ``(texts, labels)``.
    """
    return verbalizer_logps.softmax(dim=1)
