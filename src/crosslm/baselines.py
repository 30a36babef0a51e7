"""Data-free KD (section 5.2): CrossLM's step 5 with the LLM as it was before any step 4.

The other baseline, Standalone, is the SLM as its client uploads it first.
"""

from torch import Tensor

from crosslm.algorithm.rewards import label_rewards
from crosslm.config import Config
from crosslm.enhancement import select, train_on_synthetic
from crosslm.models.encoder import Encoder
from crosslm.models.slm import SLM
from crosslm.progress import Progress
from crosslm.records import SyntheticSet, Upload
from crosslm.server import receive_slm
from crosslm.task import Task
from crosslm.teachers import Teachers


def data_free_kd(
    upload: Upload,
    pool: SyntheticSet,
    config: Config,
    task: Task,
    encoder: Encoder,
    progress: Progress,
    teachers: Teachers,
    posteriors: Tensor | None = None,
) -> SLM:
    """The uploaded SLM after training on the best of a pool that the original LLM wrote.

    Args:
        upload: as the server receives it.
        pool: of the same size as CrossLM's own; one serves all clients.
        config: the same reward, selection and training as CrossLM's.
        task: the labels.
        encoder: for the diversity of Eq. 10.
        progress: is told of the training.
        teachers: who else judges, as in CrossLM's own step 5 (``reward.teachers``).
        posteriors: ``(texts,)``, the original LLM's probability of the intended labels, for
            ``selection.llm_posterior``.
    """
    slm = receive_slm(upload, task, config)
    judged = teachers.probabilities(slm, upload, pool.texts)
    _, kept = select(pool, label_rewards(judged, pool.labels), encoder, config.selection, posteriors)
    detail = f"{upload.client_id}, data-free KD"
    train_on_synthetic(slm, pool, kept, judged, upload, config, progress, detail)
    return slm
