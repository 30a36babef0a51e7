"""Uploads of several clients, a server for them, and a gate that lets one of them in or not. A plugin, too."""

import dataclasses

import pytest
import torch
from conftest import BAD, GOOD, sentences, tiny_llm

from crosslm.client import Client
from crosslm.data.examples import Examples
from crosslm.errors import QuarantineError
from crosslm.gate import Verdict
from crosslm.models.encoder import SentenceEncoder
from crosslm.models.slm import SLM
from crosslm.server import Server, receive_slm

EXAMPLES = Examples(sentences(BAD, 20) + sentences(GOOD, 20), [0] * 20 + [1] * 20)


@pytest.fixture
def uploads(models, config, task):
    """Of three clients, each with weights of its own and a silo of another size."""
    made = []
    for place, name in enumerate(("north", "south", "west")):
        slm = SLM.load(str(models / "bert"), task.labels, 32, place)
        upload = Client(name, EXAMPLES, slm, config.slm.private, place).train()
        made.append(dataclasses.replace(upload, class_counts=(10 + 20 * place, 30)))
    return made


@pytest.fixture
def received(uploads, task, config):
    return [receive_slm(upload, task, config) for upload in uploads]


def server_of(models, config, task, **slm):
    reward = config.reward.model_copy(update={"teachers": 2})
    config = config.model_copy(update={"reward": reward, "slm": config.slm.model_copy(update=slm)})
    return Server(config, task, tiny_llm(models, "gpt2"), SentenceEncoder(str(models / "encoder")))


class ShutTo:
    """A gate that lets nobody in of one name."""

    count = 0  # texts

    def __init__(self, name):
        self.name = name

    def lets_in(self, slm, upload, *_):
        return upload.client_id != self.name

    def judge(self, slm, upload, *_):
        if not self.lets_in(slm, upload):
            raise QuarantineError(f"client {upload.client_id}: quarantined", {"auc": 0.4})
        return Verdict({"auc": 0.9}, torch.zeros(0, 2))

    def accepted(self, verdict, upload, pool):
        pass
