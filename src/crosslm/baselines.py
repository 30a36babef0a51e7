"""Data-free KD (section 5.2): CrossLM's step 5 with the LLM as it was before any step 4.

The other baseline, Standalone, is the SLM as its client uploads it first.
"""

from torch import Tensor

from crosslm.config import Config
from crosslm.enhancement import pool_rewards, probe_of, select, soft_labels, train_on_synthetic, weigh_judges
from crosslm.models.encoder import Encoder
from crosslm.models.slm import SLM
from crosslm.records import SyntheticSet, Upload
from crosslm.server import receive_slm
from crosslm.support.progress import Progress
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
    said: Tensor | None = None,
    may_judge: bool = True,
) -> SLM:
    """The uploaded SLM after training on the best of a pool that the original LLM wrote.

    Args:
        upload: as the server receives it.
        pool: of the same size as CrossLM's own; one serves all clients, and judges are weighed by it.
        config: the same reward, selection and training as CrossLM's.
        task: the labels.
        encoder: for the diversity of Eq. 10.
        progress: is told of the training.
        teachers: who else judges, as in CrossLM's own step 5 (``reward.teachers``).
        said: ``(texts, labels)``, what the original LLM makes of the pool (Eq. 1), where step 5 asks it.
        may_judge: whether this SLM has a say, as in CrossLM's own step 5.
    """
    slm = receive_slm(upload, task, config)
    texts, detail = pool.texts, f"{upload.client_id}, data-free KD"
    judge = teachers.probabilities if may_judge else teachers.of_others
    with progress.stage("select", detail, teachers.readings(upload, len(texts)) + len(texts), "texts") as advance:
        judged = judge(slm, upload, texts, advance)
        _, kept = select(pool, pool_rewards(pool, judged, said), encoder, config.selection, said)
        advance(len(texts))
    weight = weigh_judges(probe_of(pool, config), judged, said)
    targets = soft_labels(pool, judged, said, config.slm, weight)
    train_on_synthetic(slm, pool, kept, targets, upload, config, progress, detail)
    return slm
